"""Commands that come before a job: `manifest`, `doctor`. cli/main.py puts them on the command line."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from context_diffusion.cli.options import errors, print_summary
from context_diffusion.core.errors import EXIT_JOB, EXIT_OK


def manifest(
    queries: Annotated[str, typer.Option(metavar="DIR", help="a folder of pictures, a path or URL")],
    contexts: Annotated[str, typer.Option(metavar="DIR", help="another; or with sub-folders, each one row's contexts")],
    pair: Annotated[Literal["all", "zip", "random"], typer.Option(help="each with each, one by one, or drawn: a row a query")],
    out: Annotated[str, typer.Option(metavar="FILE", help="ends in .parquet, .jsonl or .csv")],
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="a prompt a line; paired as the pictures are")] = None,
    contexts_per_row: Annotated[int | None, typer.Option(min=1, help="default: one; of a sub-folder all")] = None,
    seed: Annotated[int, typer.Option(help="of what `random` draws")] = 0,
) -> None:
    """Makes a manifest of two folders of pictures. The same folders, the same manifest.

    Example: context-diffusion manifest --queries photos --contexts paintings --pair all --out rows.parquet
    """
    from context_diffusion.inputs.from_folders import Pairing, write_manifest

    made = write_manifest(Pairing(queries, contexts, pair, contexts_per_row, prompts, seed), out)
    errors.print(f"{made['rows']} rows: {made['manifest']}")
    if made["allow"]:
        errors.print(f"these lie outside of its folder, a job of it needs `allow: [{', '.join(made['allow'])}]`")
    print_summary({**made, "exit": EXIT_OK})


def doctor(
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="[URL...]", help="manifests or folders that must be readable")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="URL", help="a folder that must be writable")] = None,
    model: Annotated[str, typer.Option(help="are its weights here? As a job's `model:`")] = "bundled",
    address: Annotated[str | None, typer.Option(help="of a cluster's dashboard; default: the environment's")] = None,
) -> None:
    """Looks whether all is here that a job needs: code 2 where something is broken. Starts no Ray, downloads nothing.

    Example: context-diffusion doctor s3://bucket/rows --output s3://bucket/out --model sd15
    """
    from context_diffusion.cli.doctor import examine

    checks = []
    for check in examine(urls or [], output, model, address):
        errors.print(f"{'ok    ' if check.ok else 'BROKEN'} {check.name}: {check.told}")
        checks.append({"name": check.name, "ok": check.ok, "told": check.told, **check.values})
    code = EXIT_OK if all(check["ok"] for check in checks) else EXIT_JOB
    print_summary({"checks": checks, "exit": code})
    raise typer.Exit(code)
