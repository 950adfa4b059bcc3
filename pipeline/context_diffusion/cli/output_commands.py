"""Commands on an OUTPUT folder: `report`, `view`, `verify`, `compact`. cli/main.py puts them on the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from context_diffusion.cli.options import Folder, errors, print_summary
from context_diffusion.core.errors import EXIT_OK, EXIT_UNEXPECTED, JobError


def report(output: Folder) -> None:
    """(Re)builds summary.json and report.html. Example: context-diffusion report build/demo"""
    from context_diffusion.outputs.report.build import rebuild

    opened = _open(output)
    summary = rebuild(opened)
    errors.print(f"{opened.report}")
    print_summary({**summary, "exit": EXIT_OK})


def view(
    output: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="on 127.0.0.1; 0: any that is free")] = 8000,
) -> None:
    """Shows all rows of an OUTPUT in the browser, local or in an object store. Example: context-diffusion view build/demo"""
    try:
        from context_diffusion.outputs.report.viewer import serve
    except ModuleNotFoundError as error:
        raise JobError(f"view needs {error.name}: pip install 'context-diffusion[view]'") from None

    opened = _open(output)
    url = serve(opened, port, errors.print)
    print_summary({"output": opened.root, "url": url, "exit": EXIT_OK})


def verify(output: Folder) -> None:
    """Checks every part, picture, count and checksum of a finished OUTPUT. Example: context-diffusion verify build/demo"""
    from context_diffusion.outputs.finalize import verify as find_wrong

    opened = _open(output)
    wrong = find_wrong(opened)
    for line in wrong:
        errors.print(line)
    code = EXIT_UNEXPECTED if wrong else EXIT_OK
    print_summary({"output": opened.root, "wrong": len(wrong), "exit": code})
    raise typer.Exit(code)


def compact(
    output: Folder,
    to: Annotated[str, typer.Option(metavar="DIR", help="an empty folder, a path or URL")],
    rows: Annotated[int, typer.Option(min=1, help="of a file; it has fewer where it would be larger than 256 MiB")] = 10_000,
) -> None:
    """Copies a finished OUTPUT into few large Parquet files with the pictures in them.

    Example: context-diffusion compact build/demo --to build/demo-compact
    """
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.compact import compact as merge
    from context_diffusion.outputs.output_folder import Output

    opened = _open(output)
    told = merge(opened, Output(normal(to), opened.storage), rows)
    errors.print(f"{told['rows']} rows in {told['files']} files: {told['output']}")
    print_summary({**told, "exit": EXIT_OK})


def _open(root: str) -> Any:
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.storage.filesystem import Storage

    output = Output(normal(root), Storage())
    if not output.storage.exists(output.plan):
        raise JobError(f"{root}: no plan.json there; is it the `output:` of a job that was run?")
    return output
