"""Contact sheets of a job with a matrix: of each of the first rows a grid of its images, the axes with names and values."""

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

ROWS, IMAGES = 24, 480  # on the page, at most; of one row all
COLUMNS = [ID, "index", "status", "file_name", "image", QUERY, CONTEXT, PROMPT, "width", "height", "seed", "num_images"]
Row = dict[str, Any]
SourceThumbnail = Callable[[str, Frame | None], str | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """How a matrix is laid out: its first axis goes down, the others go across; one alone goes across.

    across: of each axis its name, the columns that a value spans, and the values from left to right. down: name and values.
    """

    across: list[tuple[str, int, list[str]]]
    down: tuple[str, list[str]]
    width: int

    @classmethod
    def of(cls, matrix: Matrix) -> Grid:
        axes = [(name, [_told(value) for value in values]) for name, values in matrix.items()]
        down, beside = (axes[0], axes[1:]) if len(axes) > 1 else (("", [""]), axes)
        width, across, before = math.prod(len(values) for _, values in beside), [], 1
        for name, values in beside:
            across.append((name, width // before // len(values), values * before))
            before *= len(values)
        return cls(across, down, width)

    def lines(self, images: list[Row]) -> list[tuple[str, list[list[Row]]]]:
        """A row's images by index -> for each value that goes down its cells, each of num_images images."""
        cells = _cut(images, images[0]["num_images"])
        return list(zip(self.down[1], _cut(cells, self.width), strict=True))


def contact_sheets(output: Output, made: Callable[[Row], str | None], source: SourceThumbnail) -> Markup:
    """HTML; nothing where the job has no matrix. made: a row of data/ -> its thumbnail as a data: URL; source: the same of a
    query's or context's URI, and the query's frame; None: it is gone."""
    matrix: Matrix = output.read_json(output.plan)["job"].get("matrix") or {}
    if not matrix:
        return Markup()
    grid = Grid.of(matrix)
    sheets = [
        {
            **images[0],
            "query": source(images[0][QUERY], frame_of(images[0])),
            "contexts": [source(uri, None) for uri in images[0][CONTEXT]],
            "lines": grid.lines([image | {"made": made(image)} for image in images]),
        }
        for images in _first_rows(output)
    ]
    template = templates().get_template("contact_sheet.html.j2")
    return Markup(template.render(sheets=sheets, grid=grid, seeds="seed" not in matrix))


def _first_rows(output: Output) -> list[list[Row]]:
    """Of the first rows that were made all images, as far as the page has room."""
    rows: list[list[Row]] = []
    for shard in sorted(output.finished()):
        images: dict[str, list[Row]] = {}
        for row in output.read_part(shard, COLUMNS).to_pylist():
            if row["status"] == "ok":
                images.setdefault(row[ID], []).append(row)
        for found in images.values():
            room = IMAGES - sum(map(len, rows))
            if len(rows) == ROWS or (rows and len(found) > room):
                return rows
            rows.append(sorted(found, key=lambda row: row["index"]))
    return rows


def _cut(values: list[T], size: int) -> list[list[T]]:
    return [values[begin : begin + size] for begin in range(0, len(values), size)]


def _told(value: Any) -> str:
    if value is None:
        return "left out"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
