"""A job's matrix: which image stands at which index, with whose settings; what is refused; a row's way
through the flow."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.errors import ConfigError, ErrorCode, OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import check_job
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.core.sweep import MAX_IMAGES, images_of
from context_diffusion.generation.plan import open_plan
from context_diffusion.outputs.encode import read_metadata
from support.fakes import FakeEngine
from support.finished_output import STORAGE, flow, make
from support.manifests import write_pictures
from support.output_reader import read_output

AXES: dict[str, st.SearchStrategy[Any]] = {
    "guidance_scale": st.floats(0, 20),
    "context_scale": st.floats(0, 2),
    "scheduler": st.sampled_from(["ddim", "euler", "lcm"]),
    "num_inference_steps": st.integers(1, 50),
    "strength": st.none() | st.floats(0.1, 1),
    "seed": st.integers(0, 2**40),
}
matrices = st.lists(st.sampled_from(list(AXES)), unique=True, max_size=4).flatmap(
    lambda names: st.tuples(
        *(st.tuples(st.just(n), st.lists(AXES[n], min_size=1, max_size=3, unique=True)) for n in names)
    )
)
GRID = {"guidance_scale": [1, 3, 5], "context_scale": [0.4, 0.7, 1, 1.3]}


@given(matrices, st.integers(1, 3), st.integers(0, 2**40))
def test_an_index_is_one_combination_and_one_of_num_images(axes: Any, num_images: int, seed: int) -> None:
    matrix, own = dict(axes), Settings(seed=seed, num_images=num_images, guidance_scale=7.0)
    images = images_of(own, matrix)
    sizes = [len(values) for values in matrix.values()]
    assert len(images) == math.prod(sizes) * num_images
    for index, image in enumerate(images):
        combination, k = divmod(index, num_images)
        expected = own.model_dump()
        for name, values in reversed(matrix.items()):  # the last axis is the fastest
            combination, place = divmod(combination, len(values))
            expected[name] = values[place]
        expected["seed"] += k
        assert image.model_dump() == expected
    assert images_of(own, matrix) == images
    assert len({image.model_dump_json() for image in images}) == len(images) or "seed" in matrix


def test_a_row_s_images_are_a_grid_of_settings_each_written_with_its_own(tmp_path: Path) -> None:
    changes = {2: {"scheduler": "magic"}, 4: {"query": "gone.png"}}
    _, output = make(tmp_path, 6, changes, matrix=GRID, settings={"num_images": 2}, output_format="both")
    rows = read_output(tmp_path / "out")
    made = [row for row in rows if row["status"] == "ok"]
    assert [(r["id"], r["index"], r["error_code"]) for r in rows if r["status"] == "failed"] == [
        ("row-002", 0, "unknown_scheduler"),
        ("row-004", 0, "missing_file"),
    ]
    assert [(r["id"], r["index"]) for r in made] == [
        (f"row-{n:03d}", k) for n in (0, 1, 3, 5) for k in range(24)
    ]
    seeds = {row["id"]: row["seed"] for row in made if row["index"] == 0}
    for row in made:
        combination = [(g, c) for g in (1, 3, 5) for c in (0.4, 0.7, 1, 1.3)][row["index"] // 2]
        assert (row["guidance_scale"], row["context_scale"]) == pytest.approx(combination)
        assert row["context_guidance_scale"] == row["guidance_scale"], "left out: as guidance_scale"
        assert row["seed"] == seeds[row["id"]] + row["index"] % 2
        assert row["num_inference_steps"] == 1 + int(row["id"][-3:]) % 3, "what is no axis is the row's own"
        told = json.loads(read_metadata(row["image"]["bytes"])["context_diffusion"])
        assert (told["guidance_scale"], told["context_scale"], told["seed"]) == (*combination, row["seed"])
    assert output.count().rows == 6


def test_an_axis_goes_before_what_the_row_says_and_a_seed_axis_too(tmp_path: Path) -> None:
    make(tmp_path, 2, {0: {"scheduler": "euler"}}, matrix={"seed": [11, 3], "scheduler": ["lcm", "ddim"]})
    told = [(row["seed"], row["scheduler"]) for row in read_output(tmp_path / "out")]
    assert told == [(11, "lcm"), (11, "ddim"), (3, "lcm"), (3, "ddim")] * 2


def test_a_row_that_does_not_go_with_the_matrix_fails_and_no_other(tmp_path: Path) -> None:
    manifest = tmp_path / "in" / "manifest.jsonl"
    write_pictures(tmp_path / "in", 2)
    plain = {"query": "picture-0.png", "context": ["picture-1.png"]}
    own = [{}, {"control_guidance_end": 0.4}, {"num_images": 64}, {"num_images": 8}]
    manifest.write_text(
        "".join(json.dumps({"id": str(n), **plain, **more}) + "\n" for n, more in enumerate(own))
    )
    flow(tmp_path, manifest, matrix={"control_guidance_start": [0, 0.5], "guidance_scale": [1, 2, 3]})
    rows = read_output(tmp_path / "out")
    failed = {row["id"]: row["error_message"] for row in rows if row["status"] == "failed"}
    assert failed.keys() == {"1", "2"}
    assert "at control_guidance_start 0.5, guidance_scale 1.0" in failed["1"]
    assert "6 combinations of 64 image(s) are 384 images of one row, at most 256 are allowed" in failed["2"]
    assert [row["id"] for row in rows].count("0") == 6
    assert [row["id"] for row in rows].count("3") == 48


def test_what_an_engine_cannot_make_is_one_failed_row_with_the_settings_that_failed(tmp_path: Path) -> None:
    class Limited(FakeEngine):
        def _make(self, request: Request) -> Result | Failure:
            if request.settings.guidance_scale > 2 and request.id == "row-001":
                return Failure(ErrorCode.OUT_OF_MEMORY, "too much")
            return super()._make(request)

    make(tmp_path, 3, engine=Limited(), matrix={"guidance_scale": [1, 3, 5]})
    rows = read_output(tmp_path / "out")
    assert [(r["id"], r["index"], r["status"]) for r in rows if r["id"] == "row-001"] == [
        ("row-001", 0, "failed")
    ]
    assert next(row["guidance_scale"] for row in rows if row["id"] == "row-001") == 3
    assert len(rows) == 3 + 1 + 3


def test_a_matrix_is_of_the_job_that_output_belongs_to_its_order_too(tmp_path: Path) -> None:
    job, output = make(tmp_path, 2, matrix=GRID)
    for other in ({}, GRID | {"guidance_scale": [1, 3]}, dict(reversed(GRID.items()))):
        changed = GenerateJob.model_validate(job.model_dump(mode="json") | {"matrix": other})
        with pytest.raises(OutputConflictError, match="matrix"):
            open_plan(changed, output, STORAGE)
    open_plan(GenerateJob.model_validate(json.loads(job.model_dump_json())), output, STORAGE)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ({"guidance_scal": [1]}, "did you mean 'guidance_scale'"),
        ({"width": [64, 128]}, "width cannot be an axis"),
        ({"num_images": [1, 2]}, "num_images cannot be an axis"),
        ({"guidance_scale": []}, "guidance_scale has no values"),
        ({"guidance_scale": [1, 2, 1.0]}, "guidance_scale has the value 1.0 twice"),
        ({"guidance_scale": [1, 500]}, "should be less than or equal to 100, got 500"),
        ({"scheduler": ["magic"]}, "scheduler: should be 'ddim'"),
        ({"seed": [1, None]}, "seed: null"),
        (
            {"seed": list(range(MAX_IMAGES + 1))},
            "257 combinations of 1 image(s) are 257 images of one row, at most 256",
        ),
        (
            {"control_guidance_start": [0.1, 0.6], "control_guidance_end": [0.5, 1]},
            "at control_guidance_start 0.6, ",
        ),
        ({"guidance_scale": 3}, "should be a valid list"),
    ],
)
def test_what_is_no_matrix_is_told_before_anything_starts(matrix: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_job({"kind": "generate", "manifest": "m.csv", "output": "out", "matrix": matrix})
    assert words in str(caught.value)
    assert "matrix" in str(caught.value)
