"""Renders the contact sheets of a job with a matrix: a labelled grid of images for each of the first rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from markupsafe import Markup

from context_diffusion.core.schema import CONTEXT, ID, PROMPT, QUERY
from context_diffusion.core.sweep import Matrix
from context_diffusion.outputs.html_templates import templates
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.thumbnails import Frame, frame_of

ROWS = 24  # on the page, at most
IMAGES = 480  # on the page, at most; but the first row is shown whole
COLUMNS = [
    ID, "index", "status", "file_name", "image", QUERY, CONTEXT, PROMPT, "width", "height", "seed",
    "num_images",
]  # fmt: skip
Row = dict[str, Any]
OutputThumbnail = Callable[[Row], str | None]
SourceThumbnail = Callable[[str, Frame | None], str | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """The layout of a matrix: its first axis goes down and the others go across; a single axis goes across.

    across: the name of each axis, the columns that each value spans, and the values from left to right; down:
    name and values.
    """

    across: list[tuple[str, int, list[str]]]
    down: tuple[str, list[str]]
    width: int

    @classmethod
    def of(cls, matrix: Matrix) -> Grid:
        axes = [(name, [_label(value) for value in values]) for name, values in matrix.items()]
        down = axes[0] if len(axes) > 1 else ("", [""])
        across_axes = axes[1:] if len(axes) > 1 else axes
        width = math.prod(len(values) for _, values in across_axes)
        across = []
        repeats = 1
        for name, values in across_axes:
            across.append((name, width // repeats // len(values), values * repeats))
            repeats *= len(values)
        return cls(across, down, width)

    def lines(self, images: list[Row]) -> list[tuple[str, list[list[Row]]]]:
        """Arrange a row's images, ordered by index.

        Returns each value of the axis down with its cells of images.
        """
        cells = _cut(images, images[0]["num_images"])
        return list(zip(self.down[1], _cut(cells, self.width), strict=True))


def contact_sheets(
    output: Output, matrix: Matrix, output_thumbnail: OutputThumbnail, source_thumbnail: SourceThumbnail
) -> Markup:
    """Render the HTML of the sheets; empty if the job has no matrix.

    output_thumbnail: the thumbnail of a row of data/; source_thumbnail: that of a query or context by its URI
    and frame. Both return a data: URL, or None if the image is missing.
    """
    if not matrix:
        return Markup()
    grid = Grid.of(matrix)
    sheets = [
        {
            **images[0],
            "query": source_thumbnail(images[0][QUERY], frame_of(images[0])),
            "contexts": [source_thumbnail(uri, None) for uri in images[0][CONTEXT]],
            "lines": grid.lines([image | {"thumbnail": output_thumbnail(image)} for image in images]),
        }
        for images in _first_rows(output)
    ]
    template = templates("context_diffusion.outputs.report").get_template("contact_sheet.html.j2")
    return Markup(template.render(sheets=sheets, grid=grid, seeds="seed" not in matrix))


def _first_rows(output: Output) -> list[list[Row]]:
    """Return all images of each of the first successful rows, up to ROWS and IMAGES."""
    rows: list[list[Row]] = []
    for shard in sorted(output.finished()):
        by_row: dict[str, list[Row]] = {}
        for row in output.read_part(shard, COLUMNS).to_pylist():
            if row["status"] == "ok":
                by_row.setdefault(row[ID], []).append(row)
        for images in by_row.values():
            room = IMAGES - sum(map(len, rows))
            if len(rows) == ROWS or (rows and len(images) > room):
                return rows
            rows.append(sorted(images, key=lambda image: image["index"]))
    return rows


def _cut(values: list[T], size: int) -> list[list[T]]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]


def _label(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
