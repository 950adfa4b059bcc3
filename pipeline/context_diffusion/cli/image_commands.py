"""The commands that generate images in this process, without Ray: `preview`, `reproduce`."""

from __future__ import annotations

from typing import Annotated

import typer

from context_diffusion.cli.options import JobFile, Sets, load_generating, print_summary, stderr
from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED


def preview(
    job: JobFile,
    grid: Annotated[
        list[str],
        typer.Option(metavar="SETTING=VALUE,...", help="setting of the columns; given twice, of the rows"),
    ],
    out: Annotated[str, typer.Option(metavar="FILE.png", help="file of the contact sheet")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTING=VALUE,...]", help="setting of the rows, same as --grid"),
    ] = None,
    row: Annotated[
        str | None, typer.Option(metavar="ID", help="id of the row; default: the first row")
    ] = None,
    sets: Sets = None,
) -> None:
    """Generate one row at each value of one or two settings, side by side, without Ray.

    Example: context-diffusion preview jobs/demo.yaml --grid guidance_scale=1,3 context_scale=.4,1 --out
    grid.png"""
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
    file: Annotated[str, typer.Argument(metavar="FILE", help="an image that a job generated, a path or URL")],
    output: Annotated[
        str | None, typer.Option(metavar="FILE2", help="file of the new image: .png, .webp or .jpg")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="prefixes of URIs that may be read; default: the job's"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="folder of relative sources, allowed to be read; default: the manifest's"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the model; default: the job's")] = None,
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
    stderr.print(f"{file}: {verdict}{note}")
    for line in result.differs:
        stderr.print(f"  {line}")
    code = EXIT_OK if result.identical else EXIT_ROWS_FAILED
    metadata = origin.metadata
    fields = {"id": metadata["id"], "index": metadata.get("index", 0), "device": result.device}
    fields |= {"identical": result.identical, "differs": result.differs}
    print_summary({"file": origin.uri, **fields, "exit": code})
    raise typer.Exit(code)
