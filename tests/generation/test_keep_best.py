"""Which of a row's images is kept, which is flagged, which is marked unsafe; and the counts of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from context_diffusion.core.errors import OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Request, Result
from context_diffusion.evaluation.scores import best_of, is_flagged
from context_diffusion.generation.plan import open_plan
from context_diffusion.outputs.encode import read_metadata
from context_diffusion.outputs.finalize import close, verify
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.status import progress_of
from support.fakes import FakeEngine
from support.finished_output import STORAGE, make
from support.output_reader import read_output

CHEAP = ["style", "leakage"]  # of the fake's pictures the layout is always the query's
FOUR = {"num_images": 4}
Row = dict[str, Any]


class Marking(FakeEngine):
    """With a safety checker's verdicts: by the index of the image, and of row-003 all."""

    def _make(self, request: Request) -> Result:
        made = super()._make(request)
        return dataclasses.replace(made, unsafe=request.id == "row-003" or request.index in self.unsafe)

    def __init__(self, unsafe: set[int]) -> None:
        super().__init__()
        self.unsafe = unsafe


def mean(row: Row) -> float:
    """The stated rule, once more."""
    return float(np.mean([row["style_score"], 1 - row["layout_leakage"], 1 - (row["colour_leakage"] or 0)]))


def by_row(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def test_the_highest_mean_counts_leakage_against_and_leaves_out_what_one_lacks() -> None:
    columns = ["layout_score", "prompt_score", "layout_leakage"]
    given = [(0.5, 0.2, 0.0), (0.9, 0.1, 0.6), (0.6, None, 0.0), (0.6, 0.9, 0.0)]
    images = [dict(zip(columns, values, strict=True)) for values in given]
    assert best_of(images, columns) == 2, "of equal ones the first, by the scores that all have"
    assert best_of(images[:2], columns) == 0
    assert best_of(images[:2], columns[:1]) == 1
    assert best_of([{"prompt_score": None}] * 3, ["prompt_score"]) == 0


def test_a_score_below_its_least_and_a_leakage_above_its_greatest_are_flagged() -> None:
    image = {"layout_score": 0.3, "prompt_score": None, "layout_leakage": 0.5}
    assert is_flagged(image, {}) is None
    assert is_flagged(image, {"prompt_score": 0.9}) is None
    assert is_flagged(image, {"prompt_score": 0.9, "layout_score": 0.3, "layout_leakage": 0.5}) is False
    assert is_flagged(image, {"layout_score": 0.31}) is True
    assert is_flagged(image, {"layout_score": 0.3, "layout_leakage": 0.49}) is True


@pytest.mark.parametrize("form", ["files", "parquet"])
def test_the_best_image_alone_is_written_with_the_seed_that_makes_it_again(tmp_path: Path, form: str) -> None:
    changes = {2: {"query": "gone.png"}}
    make(tmp_path / "all", 6, changes, settings=FOUR, score=CHEAP)
    _, output = make(
        tmp_path / "best", 6, changes, settings=FOUR, score=CHEAP, keep="best", output_format=form
    )
    every = by_row(read_output(tmp_path / "all" / "out"))
    kept = [row for _, part in output.read_parts() for row in part.to_pylist()]
    assert [row["id"] for row in kept] == list(every)
    assert kept[2]["error_code"] == "missing_file"
    for row in kept[:2] + kept[3:]:
        best = max(every[row["id"]], key=mean)
        same = ("index", "seed", "num_images", "author", "style_score", "layout_leakage")
        assert [row[name] for name in same] == [best[name] for name in same]
        data = output.image(row)
        told = json.loads(read_metadata(data)["context_diffusion"])
        assert (told["index"], told["seed"]) == (best["index"], best["seed"])
    assert len({row["index"] for row in kept}) > 1, "not always the first"
    assert vars(output.count()) | {"codes": {}} == {
        "rows": 6, "ok": 5, "failed": 1, "images": 5, "codes": {}, "flagged": 0, "unsafe": 0,
        "unknown_words": 0,
    }  # fmt: skip
    if form == "files":
        read_output(tmp_path / "best" / "out")  # no picture without a row
        close(output)
        assert verify(output) == []


@pytest.mark.parametrize("form", ["files", "webdataset"])
def test_what_an_earlier_attempt_chose_on_another_device_is_kept(tmp_path: Path, form: str) -> None:
    job, output = make(tmp_path, 4, settings=FOUR, score=CHEAP, keep="best", output_format=form)
    first = output.read_part(0).to_pylist()
    # Before its part was written it ended; its scores differed in the last bits.
    [part] = (tmp_path / "out" / "data").iterdir()
    part.unlink()
    for path in [*(tmp_path / "out" / "images").rglob("*.png"), *(tmp_path / "out" / "webdataset").glob("*")]:
        path.unlink()
    make(tmp_path, 4, engine=Marking({row["index"] for row in first}), **_keys(job))
    left = output.read_part(0).to_pylist()
    assert [row["index"] for row in left[:3]] != [row["index"] for row in first[:3]]
    part.unlink()
    make(tmp_path, 4, **_keys(job))
    again = output.read_part(0).to_pylist()
    same = ("id", "index", "seed", "sha256", "file_name", "style_score")
    assert [[row[name] for name in same] for row in again] == [[row[name] for name in same] for row in left]
    if form == "files":
        read_output(tmp_path / "out")


def _keys(job: GenerateJob) -> Row:
    return {"settings": FOUR, "score": CHEAP, "keep": "best", "output_format": job.output_format}


def test_an_unsafe_image_is_marked_counted_and_kept_only_where_all_are(tmp_path: Path) -> None:
    _, output = make(tmp_path / "all", 4, engine=Marking({1, 2}), settings=FOUR)
    rows = read_output(tmp_path / "all" / "out")
    assert [row["unsafe"] for row in rows] == [False, True, True, False] * 3 + [True] * 4
    assert all(row["status"] == "ok" for row in rows)
    assert (output.count().images, output.count().unsafe) == (16, 10)
    for safe in (0, 3):  # one of them is not the best
        make(
            tmp_path / f"best{safe}",
            4,
            engine=Marking({0, 1, 2, 3} - {safe}),
            settings=FOUR,
            score=CHEAP,
            keep="best",
        )
        kept = read_output(tmp_path / f"best{safe}" / "out")
        assert [(row["index"], row["unsafe"]) for row in kept[:3]] == [(safe, False)] * 3
        assert kept[3]["unsafe"] is True


def test_thresholds_flag_rows_that_are_ok_and_the_summary_and_status_count_them(tmp_path: Path) -> None:
    make(tmp_path / "plain", 8, {2: {"query": "gone.png"}}, score=CHEAP)
    plain = read_output(tmp_path / "plain" / "out")
    assert all(row["flagged"] is None for row in plain)
    least = float(np.median([row["style_score"] for row in plain if row["status"] == "ok"]))
    limits = {"style_score": least, "colour_leakage": 0.9}
    _, output = make(tmp_path / "told", 8, {2: {"query": "gone.png"}}, score=CHEAP, thresholds=limits)
    rows = read_output(tmp_path / "told" / "out")
    assert rows[2]["flagged"] is None
    for row in rows[:2] + rows[3:]:
        assert row["status"] == "ok"
        assert row["flagged"] is (row["style_score"] < least or (row["colour_leakage"] or 0) > 0.9)
    flagged = sum(row["flagged"] is True for row in rows)
    assert 0 < flagged < 7
    told = progress_of(output)
    assert (told.values["ok"], told.values["flagged"]) == (7, flagged)
    assert f"  flagged: {flagged}" in told.lines


def test_what_is_kept_belongs_to_an_output_and_thresholds_do_not(tmp_path: Path) -> None:
    job, output = make(tmp_path, 4, settings=FOUR, score=CHEAP, keep="best")

    def reopened(**change: Any) -> None:
        open_plan(GenerateJob.model_validate(job.model_dump() | change), Output(job.output, STORAGE), STORAGE)

    reopened(score=CHEAP[::-1], thresholds={"style_score": 0.2})
    for change, word in (({"keep": "all"}, "keep: 'best' planned"), ({"score": ["style"]}, "score")):
        with pytest.raises(OutputConflictError, match=word):
            reopened(**change)
    assert output.count().images == 4
