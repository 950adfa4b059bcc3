"""Contact sheets: each picture stands under its own settings; what a manifest says is escaped; the page stays
bounded."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from context_diffusion.core.records import Request, Result
from context_diffusion.outputs.report.build import write_report
from context_diffusion.outputs.report.sweep_grid import IMAGES, Grid, contact_sheets
from support.fakes import FakeEngine
from support.finished_output import make

AXES: dict[str, list[Any]] = {
    "guidance_scale": [1, 3],
    "strength": [None, 0.5, 1],
    "scheduler": ["ddim", "lcm"],
}


class Tables(HTMLParser):
    """The tables of a page as a browser lays them out: a list of lines of texts and image sources, spans
    unrolled."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.span = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.span = int(given.get("colspan", 1))
            self.tables[-1][-1] += [""] * self.span
        elif tag == "img" and self.span:
            self.handle_data(given["src"] + " ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.span = 0

    def handle_data(self, data: str) -> None:
        for number in range(1, self.span + 1):
            self.tables[-1][-1][-number] += data


def sheets(folder: Path, count: int = 2, **more: Any) -> list[list[list[str]]]:
    """The sheets, each picture named by what its row in data/ says."""
    _, output = make(folder, count, **more)

    def named(row: dict[str, Any]) -> str:
        written = next(
            r
            for _, part in output.read_parts()
            for r in part.to_pylist()
            if r["file_name"] == row["file_name"]
        )
        return "|".join(
            str(written[name]) for name in ("id", "guidance_scale", "strength", "scheduler", "seed")
        )

    return Tables(
        contact_sheets(
            output, output.read_plan()["job"].get("matrix") or {}, named, lambda uri, _frame: f"source:{uri}"
        )
    ).tables


def test_each_picture_stands_under_its_own_settings(tmp_path: Path) -> None:
    found = sheets(tmp_path, matrix=AXES, settings={"num_images": 2, "seed": 7})
    assert len(found) == 2
    for number, (strengths, schedulers, *lines) in enumerate(found):
        assert [strengths[0], schedulers[0]] == ["strength", "scheduler"]
        assert strengths[1:] == ["default"] * 2 + ["0.5"] * 2 + ["1"] * 2
        assert [line[0] for line in lines] == ["guidance_scale 1", "guidance_scale 3"]
        for line in lines:
            for strength, scheduler, cell in zip(strengths[1:], schedulers[1:], line[1:], strict=True):
                used = None if strength == "default" else float(strength)
                own = f"row-{number:03d}|{float(line[0].split()[1])}|{used}"
                assert cell.split() == [f"{own}|{scheduler}|{seed}" for seed in (7, 8)]


def test_one_axis_alone_goes_across(tmp_path: Path) -> None:
    [[header, line]] = sheets(tmp_path, 1, matrix={"context_scale": [0.4, 1, 1.3]})
    assert header == ["context_scale", "0.4", "1", "1.3"]
    assert len(line) == 4


@pytest.mark.parametrize("form", ["files", "parquet", "webdataset"])
def test_the_report_holds_them_wherever_pictures_lie_and_escapes_all(tmp_path: Path, form: str) -> None:
    attack = "<script>alert(1)</script>"
    changes = {0: {"prompt": attack, "id": attack}, 1: {"query": "gone.png"}}
    _, output = make(tmp_path, 4, changes, matrix={"guidance_scale": [1, 3]}, output_format=form)
    write_report(output, {**vars(output.count()), "output": "out", "seconds": 1, "images_per_second": 1})
    page = Path(output.report).read_text()
    assert attack not in page
    assert page.count('<section class="sheet">') == 3, "a row that failed has none"
    assert [len(lines[1]) for lines in Tables(page).tables[-3:]] == [3, 3, 3]
    assert "data:image/webp" in Tables(page).tables[-1][1][1]


def test_a_job_without_a_matrix_has_none(tmp_path: Path) -> None:
    assert sheets(tmp_path) == []


def test_the_page_is_bounded_but_one_row_is_whole(tmp_path: Path) -> None:
    class Small(FakeEngine):
        def _make(self, request: Request) -> Result:
            made = super()._make(request)
            return Result(made.image[:8, :8], made.seconds, made.lanes, made.device)

    found = sheets(tmp_path, 4, engine=Small(), matrix={"seed": list(range(200))})
    assert len(found) == IMAGES // 200 == 2
    assert [len(table[1]) for table in found] == [201, 201]


def test_the_grid_of_three_axes() -> None:
    grid = Grid.of({"a": [1], "b": [1, 2], "c": [[0.5, 1.0], None, "x"]})
    assert grid.down == ("a", ["1"])
    assert grid.across == [("b", 3, ["1", "2"]), ("c", 1, ["[0.5, 1.0]", "default", "x"] * 2)]
    assert grid.width == 6
