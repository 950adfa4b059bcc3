"""The commands that read an OUTPUT folder: `report`, `view`, `verify`, `compact`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from context_diffusion.cli.options import Folder, print_summary, stderr
from context_diffusion.core.errors import EXIT_OK, EXIT_UNEXPECTED, JobError


def report(output: Folder) -> None:
    """Regenerate summary.json and report.html.

    Example: context-diffusion report build/demo
    """
    from context_diffusion.outputs.report.build import rebuild

    folder = _open(output)
    summary = rebuild(folder)
    stderr.print(folder.report)
    print_summary({**summary, "exit": EXIT_OK})


def view(
    output: Folder,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="port on 127.0.0.1; 0 takes any free port")
    ] = 8000,
) -> None:
    """Show all rows of an OUTPUT, local or in an object store, in the browser.

    Example: context-diffusion view build/demo
    """
    try:
        from context_diffusion.outputs.report.viewer import serve
    except ModuleNotFoundError as error:
        raise JobError(f"view needs {error.name}: pip install 'context-diffusion[view]'") from None

    folder = _open(output)
    url = serve(folder, port, stderr.print)
    print_summary({"output": folder.root, "url": url, "exit": EXIT_OK})


def verify(output: Folder) -> None:
    """Check every part, image, count and checksum of a finished OUTPUT.

    Exit code 1 if anything differs.

    Example: context-diffusion verify build/demo
    """
    from context_diffusion.outputs.finalize import verify as find_errors

    folder = _open(output)
    errors = find_errors(folder)
    for line in errors:
        stderr.print(line)
    if not errors:
        stderr.print(f"{folder.root}: complete, and every file matches its checksum")
    code = EXIT_UNEXPECTED if errors else EXIT_OK
    print_summary({"output": folder.root, "wrong": len(errors), "exit": code})
    raise typer.Exit(code)


def compact(
    output: Folder,
    to: Annotated[str, typer.Option(metavar="DIR", help="an empty folder, a path or URL")],
    rows: Annotated[
        int, typer.Option(min=1, help="maximum rows per file; fewer if it would exceed 256 MiB")
    ] = 10_000,
) -> None:
    """Copy a finished OUTPUT into few large Parquet files that contain the images.

    Example: context-diffusion compact build/demo --to build/demo-compact
    """
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.compact import compact as merge
    from context_diffusion.outputs.output_folder import Output

    folder = _open(output)
    summary = merge(folder, Output(normal(to), folder.storage), rows)
    stderr.print(f"{summary['rows']} rows in {summary['files']} files: {summary['output']}")
    print_summary({**summary, "exit": EXIT_OK})


def _open(root: str) -> Any:
    """Return the Output of a folder. Raises JobError if it has no plan.json."""
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.storage.filesystem import Storage

    output = Output(normal(root), Storage())
    if not output.storage.exists(output.plan):
        raise JobError(f"{root}: no plan.json there: expected the `output:` of a job that was run")
    return output
