"""The commands that generate images in this process, without Ray: `preview`, `reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from context_diffusion.cli.options import JobFile, Sets, load_generating, print_summary, stderr
from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED

Grid = Annotated[
    list[str],
    typer.Option(
        metavar="SETTING=VALUE,...",
        help="a setting that varies by column; if given twice, the second varies by row",
    ),
]
SheetFile = Annotated[str, typer.Option(metavar="FILE.png", help="the contact sheet to write")]
MoreAxes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SETTING=VALUE,...]", help="the setting that varies by row, as a second --grid"),
]
RowId = Annotated[str | None, typer.Option(metavar="ID", help="id of the row; default: the first row")]

ImageFile = Annotated[
    str, typer.Argument(metavar="FILE", help="an image that a job generated, a path or URL")
]
NewFile = Annotated[
    str | None, typer.Option(metavar="NEW_FILE", help="the new image to write: .png, .webp or .jpg")
]
Prefixes = Annotated[
    list[str] | None,
    typer.Option(metavar="PREFIX", help="prefixes of URIs that may be read; default: the job's"),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="folder of relative sources, allowed to be read; default: the manifest's"
    ),
]
Model = Annotated[str | None, typer.Option(help="the model; default: the job's")]


def preview(
    job: JobFile, grid: Grid, out: SheetFile, more: MoreAxes = None, row: RowId = None, sets: Sets = None
) -> None:
    """Generate one row at each value of one or two settings, side by side, without Ray.

    Example: context-diffusion preview jobs/demo.yaml --grid guidance_scale=1,3,5 --out grid.png
    """
    from context_diffusion.generation.local_model import png_uri, write_sheet
    from context_diffusion.generation.preview import axes_of, setting_grid

    uri = png_uri("--out", out)
    axes = axes_of([*grid, *(more or [])])
    row_id, cells = setting_grid(load_generating(job, sets)[0], axes, row)
    write_sheet(uri, cells)
    stderr.print(f"row {row_id}: {uri}")
    images = sum(map(len, cells[1:]))
    print_summary({"row": row_id, "grid": dict(axes), "images": images, "out": uri, "exit": EXIT_OK})


def reproduce(
    file: ImageFile, output: NewFile = None, allow: Prefixes = None, base: Base = None, model: Model = None
) -> None:
    """Generate an image again and compare the pixels.

    The settings are those of the image's metadata or its OUTPUT.
    Exit code 0: identical, 3: different, 2: not possible.

    Example: context-diffusion reproduce build/demo/images/part-00000/demo-00-0.png
    """
    from context_diffusion.generation import reproduce as reproduction
    from context_diffusion.generation.image_origin import find_origin

    write = reproduction.writer(output)
    origin = find_origin(file)
    result = reproduction.reproduce(origin, allow or [], model, base)
    write(result)
    verdict = "identical" if result.identical else "different"
    note = ", although these differ:" if result.identical and result.differs else ""
    stderr.print("\n  ".join([f"{file}: {verdict}{note}", *result.differs]))
    code = EXIT_OK if result.identical else EXIT_ROWS_FAILED
    row = {"id": origin.metadata["id"], "index": origin.metadata.get("index", 0), "device": result.device}
    comparison = {"identical": result.identical, "differs": result.differs}
    print_summary({"file": origin.uri, **row, **comparison, "exit": code})
    raise typer.Exit(code)
