"""Commands that make pictures in this process, without Ray: `reproduce`, `preview`. cli/main.py puts them on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from context_diffusion.cli.options import JobFile, Sets, errors, load_generating, print_summary
from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED

Picture = Annotated[str, typer.Argument(metavar="FILE", help="a picture that a job made, a path or URL")]


def reproduce(
    file: Picture,
    output: Annotated[str | None, typer.Option(metavar="FILE2", help="where the new one is written: .png, .webp, .jpg")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="PREFIX", help="what it may read; default: what its job might")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="of its relative sources, which it may read; default: its manifest's")
    ] = None,
    model: Annotated[str | None, typer.Option(help="where the model lies; default: what its job says")] = None,
) -> None:
    """Makes a picture again from what it says, or its OUTPUT, and compares: code 0 identical, 3 differs, 2 cannot be made.

    Example: context-diffusion reproduce build/demo/images/part-00000/demo-00-0.png
    """
    from context_diffusion.generation import reproduce as reproduction
    from context_diffusion.generation.image_origin import find_origin

    write = reproduction.writer(output)
    origin = find_origin(file)
    result = reproduction.reproduce(origin, allow or [], model, base)
    write(result)
    verdict = "identical" if result.identical else "different"
    errors.print(f"{file}: {verdict}{', although these differ:' if result.identical and result.differs else ''}")
    for line in result.differs:
        errors.print(f"  {line}")
    code = EXIT_OK if result.identical else EXIT_ROWS_FAILED
    row = {"id": origin.metadata["id"], "index": origin.metadata.get("index", 0), "device": result.device}
    summary = {"file": origin.uri, **row, "identical": result.identical, "differs": result.differs, "exit": code}
    print_summary(summary)
    raise typer.Exit(code)


def preview(
    job: JobFile,
    grid: Annotated[list[str], typer.Option(metavar="SETTING=VALUE,...", help="its columns; a second one: lines")],
    out: Annotated[str, typer.Option(metavar="FILE.png", help="where the sheet goes")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[SETTING=VALUE,...]", help="the lines, as --grid")] = None,
    row: Annotated[str | None, typer.Option(metavar="ID", help="of the manifest; default: its first")] = None,
    sets: Sets = None,
) -> None:
    """Makes one row's picture for each value of a setting or two, side by side; starts no Ray.

    Example: context-diffusion preview jobs/demo.yaml --grid guidance_scale=1,3,5 context_scale=.4,.7,1 --out grid.png
    """
    from context_diffusion.generation.local_model import png_uri, write_sheet
    from context_diffusion.generation.preview import axes_of, setting_grid

    uri, axes = png_uri("--out", out), axes_of([*grid, *(more or [])])
    made, cells = setting_grid(load_generating(job, sets)[0], axes, row)
    write_sheet(uri, cells)
    errors.print(f"row {made}: {uri}")
    print_summary({"row": made, "grid": dict(axes), "images": sum(map(len, cells[1:])), "out": uri, "exit": EXIT_OK})
