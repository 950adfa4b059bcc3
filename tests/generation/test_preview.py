"""Pictures before a run: a grid of one row's settings, a sample's sheet with what the job will take. A tiny
real model."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from context_diffusion import ContextDiffusion
from context_diffusion.cli import main
from context_diffusion.core.errors import ContextDiffusionError, StorageError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Request, derive_id, derive_seed
from context_diffusion.generation import estimate
from context_diffusion.generation.local_model import LocalModel
from context_diffusion.generation.preview import axes_of, setting_grid
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.validate import validate_job
from context_diffusion.outputs.contact_sheet import GAP, SIDE, contact_sheet
from support.manifests import job_values, write_manifest
from support.tiny import picture
from support.user_images import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("model") / "tiny")


def make_job(
    folder: Path, base: str, changes: dict[int, dict[str, Any]] | None = None, **more: Any
) -> GenerateJob:
    manifest = write_manifest(folder / "in", 6, changes)
    return GenerateJob.model_validate(job_values(manifest, folder / "out", model=base, **more))


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["context-diffusion", *arguments])
        code = main._run()
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def test_each_cell_is_the_row_s_picture_with_those_settings(tmp_path: Path, base: str) -> None:
    job = make_job(tmp_path, base, seed=3)
    row, lines = setting_grid(job, axes_of(["guidance_scale=1,4", "context_scale=.5,1,2"]), "row-001")
    assert (row, [len(line) for line in lines]) == ("row-001", [3, 2, 2, 2])
    assert [caption for caption, _ in lines[0]] == ["query ocean", "context 1", "context 2"]
    model, inputs = ContextDiffusion.from_pretrained(base, "cpu"), tmp_path / "in"
    own = {"num_inference_steps": 2, "scheduler": "euler", "seed": derive_seed(3, "row-001")}
    for line, context_scale in zip(lines[1:], (0.5, 1, 2), strict=True):
        for (caption, made), guidance_scale in zip(line, (1, 4), strict=True):
            assert caption == f"guidance_scale {guidance_scale} context_scale {context_scale}"
            paths = [str(inputs / f"picture-{number}.png") for number in (1, 2, 3)]
            scales = {"guidance_scale": guidance_scale, "context_scale": context_scale}
            alone = np.asarray(model(paths[0], paths[1:], "ocean", **own, **scales))
            # in smaller calls of the model than the grid's, so the last bits may differ
            assert np.abs(made.astype(int) - alone).max() <= 1
    assert len({made.tobytes() for line in lines[1:] for _, made in line}) == 6


def test_a_row_without_an_id_keeps_the_seed_that_follows_from_all_of_it(tmp_path: Path, base: str) -> None:
    job = make_job(tmp_path, base)
    manifest = tmp_path / "in" / "manifest.parquet"
    pq.write_table(pq.read_table(manifest).drop_columns(["id"]), manifest)
    row, [_, [(_, made)]] = setting_grid(job, axes_of(["guidance_scale=1"]), None)
    model, inputs = ContextDiffusion.from_pretrained(base, "cpu"), tmp_path / "in"
    own = {"num_inference_steps": 1, "guidance_scale": 1, "seed": derive_seed(0, row)}
    assert row == derive_id(pq.read_table(manifest).to_pylist()[0])
    assert np.array_equal(
        made, np.asarray(model(str(inputs / "picture-0.png"), [str(inputs / "picture-1.png")], None, **own))
    )


@pytest.mark.parametrize(
    ("grid", "row", "words"),
    [
        (
            ["guidance_scale=1,-2"],
            None,
            r"row 'row-000' with guidance_scale=-2: invalid_setting: guidance_scale: should be",
        ),
        (["scheduler=ddim,magic"], None, "scheduler=magic: unknown_scheduler"),
        (["width=100"], None, "width: should be a multiple of 16"),
        (
            ["control_guidance_start=.9", "control_guidance_end=.5"],
            None,
            r"must be below control_guidance_end \(0.5\)",
        ),
        (["context_weights=[1,2,3]"], None, "context_weights has 3 values for 1 contexts"),
        (["seed=1"], "row-999", "has no row 'row-999'"),
        (["seed=1"], "row-002", "row 'row-002' with seed=1: missing_file"),
        (["seed=" + ",".join(map(str, range(200)))], None, "200 images, at most 144"),
        (["seed=1", "width=64", "height=64"], None, "one or two settings \(columns, then rows\), not 3"),
        (["seed="], None, "expected setting=value,value"),
    ],
)
def test_what_is_wrong_about_a_grid_is_said(
    tmp_path: Path, base: str, grid: list[str], row: str | None, words: str
) -> None:
    job = make_job(tmp_path, base, {2: {"query": "gone.png"}})
    with pytest.raises(ContextDiffusionError, match=words):
        setting_grid(job, axes_of(grid), row)


def test_a_sheet_has_a_square_and_a_caption_for_each_picture() -> None:
    wide = np.full((64, 128, 3), (10, 120, 230), np.uint8)
    sheet = contact_sheet([[("", wide), ("words " * 40, picture(2))], [("a", picture(3))]])
    assert sheet.shape[1] == GAP + 2 * (SIDE + GAP)
    square = sheet[GAP : GAP + SIDE, GAP : GAP + SIDE]
    assert (square[: SIDE // 4] == 255).all()  # a wide picture lies in the middle
    assert (square[SIDE // 4 : SIDE * 3 // 4] == (10, 120, 230)).all()
    below = sheet[GAP + SIDE + GAP : GAP + SIDE + 40]
    assert (below[:, : GAP + SIDE] == 255).all()  # no caption, no ink
    assert (below[:, 2 * GAP + SIDE :] < 100).any()


def test_preview_on_the_command_line(tmp_path: Path, base: str, capfd: pytest.CaptureFixture[str]) -> None:
    job, out = tmp_path / "job.json", tmp_path / "new" / "grid.png"
    job.write_text(make_job(tmp_path, base).model_dump_json(exclude_unset=True))
    code, told, err = call(
        capfd, "preview", str(job), "--grid", "seed=1,2", "num_inference_steps=1,2", "--out", str(out)
    )
    assert (code, told["images"], told["row"], told["out"]) == (0, 4, "row-000", str(out))
    assert told["grid"] == {"seed": [1, 2], "num_inference_steps": [1, 2]}
    assert Image.open(io.BytesIO(out.read_bytes())).width == GAP + 2 * (SIDE + GAP)
    assert str(out) in err


def test_a_sample_s_pictures_and_what_the_job_will_take(
    tmp_path: Path, base: str, capfd: pytest.CaptureFixture[str]
) -> None:
    job, sheet = tmp_path / "job.json", tmp_path / "sheet.png"
    values = make_job(
        tmp_path, base, {3: {"scheduler": "magic"}}, settings={"num_images": 3}, cluster={"actors": [2, 4]}
    )
    job.write_text(values.model_dump_json(exclude_unset=True))
    more = ["--sample", "6", "--pictures", str(sheet)]
    code, told, err = call(capfd, "validate", str(job), *more)
    assert (code, told["rows"], told["images"], told["engines"], told["device"]) == (3, 6, 15, 2, "cpu")
    assert told["estimated_seconds"] == pytest.approx(15 * told["seconds_per_image"] / 2, abs=1)
    assert len(told["problems"]) == 1
    assert Image.open(sheet).size[1] > 5 * SIDE  # a line for each row that can be made
    assert "15 images, " in err
    assert "on 2 engines like this one" in err
    assert not (tmp_path / "out").exists()


def test_the_warm_up_of_an_engine_is_no_part_of_the_estimate(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: the first image with all its steps takes 600 s, as one whose kernels are built,
    each other 2 s."""
    clock, warm, chunks = [0.0], [False], set()
    generate = LocalModel.generate

    def slow(maker: LocalModel, requests: list[Request], chunk: int | None = None) -> Any:
        whole = any(request.settings.num_inference_steps > 1 for request in requests)
        clock[0] += 2.0 * len(requests) + (600 if whole and not warm[0] else 0)
        warm[0] |= whole
        chunks.add(chunk)
        return generate(maker, requests, chunk)

    monkeypatch.setattr(LocalModel, "generate", slow)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    job = make_job(tmp_path, base, {n: {"num_inference_steps": 3} for n in range(6)}, cluster={"chunk": 3})
    told = validate_job(job, 3, str(tmp_path / "sheet.png"))
    assert chunks == {3}, "the time is that of the job's calls of the model"
    assert (told["measured_images"], told["warm_up_seconds"]) == (3, 602)
    assert 0 < told["filled"] <= 1
    assert told["seconds_per_image"] == pytest.approx(2.0 * told["filled"], abs=0.01)
    assert told["estimated_seconds"] == pytest.approx(6 * 2.0 * told["filled"], abs=1)
    assert any("is not included" in line for line in estimate.estimate_lines(told))


def test_a_duration_has_two_units_at_most() -> None:
    figures = {"images": 9, "seconds_per_image": 1.5, "engines": 1, "device": "cpu", "measured_images": 1}
    figures |= {"warm_up_seconds": 2.0, "filled": 1.0, "pictures": "sample.png"}
    for seconds, text in ((0, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")):
        assert (
            f": about {text} on 1 engine"
            in estimate.estimate_lines(figures | {"estimated_seconds": seconds})[0]
        )


def sampled_contexts(job: GenerateJob, monkeypatch: pytest.MonkeyPatch, sample: int) -> list[list[str]]:
    """The contexts of the rows that were looked at."""
    seen: list[list[str]] = []
    load = LoadImages.__call__

    def watched(self: LoadImages, table: Any) -> Any:
        seen.extend([source["path"] for source in row] for row in table["context"].to_pylist())
        return load(self, table)

    monkeypatch.setattr(LoadImages, "__call__", watched)
    validate_job(job, sample)
    return seen


@pytest.mark.parametrize("queries_first", [True, False])
def test_a_sample_of_all_pairs_shows_different_contexts(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, queries_first: bool
) -> None:
    """Six contexts, four queries: of 24 rows every sixth has the same context."""
    pairs = [(query, context) for query in range(4) for context in range(6)]
    pairs = pairs if queries_first else sorted(pairs, key=lambda pair: pair[1])
    changes = {
        n: {"query": f"picture-{q}.png", "context": [f"picture-{c}.png"]} for n, (q, c) in enumerate(pairs)
    }
    job = GenerateJob.model_validate(
        job_values(write_manifest(tmp_path / "in", 24, changes), tmp_path / "out", model=base)
    )
    seen = sampled_contexts(job, monkeypatch, 4)
    assert len(seen) == 4
    assert len({str(context) for context in seen}) == 4


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "structs"])
def test_a_protocol_whose_package_is_missing_is_told_whatever_row_names_it(
    tmp_path: Path, base: str, form: str
) -> None:
    job = make_job(tmp_path, base)
    rows = [{"id": f"r{n}", "query": "picture-0.png", "context": ["picture-1.png"]} for n in range(1000)]
    rows[500] |= {"query": "gs://bucket/query.png", "context": ["picture-1.png", "GS://bucket/context.png"]}
    rows[700] |= {"context": ["picture-1.png", "abfs://store/context.png"]}
    manifest = tmp_path / "in" / f"rows.{'parquet' if form == 'structs' else form}"
    if form == "jsonl":
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        lines = [[row["id"], row["query"], json.dumps(row["context"]).replace('"', '""')] for row in rows]
        manifest.write_text("id,query,context\n" + "".join(f'{a},{b},"{c}"\n' for a, b, c in lines))
    else:
        if form == "structs":
            for row in rows:
                row["query"] = {"bytes": None, "path": row["query"]}
                row["context"] = [{"bytes": None, "path": path} for path in row["context"]]
        pq.write_table(pa.Table.from_pylist(rows), manifest, row_group_size=300)
    told = validate_job(job.model_copy(update={"manifest": str(manifest)}), 1)
    assert (told["rows"], told["problems"], told["exit"]) == (1000, [], 3)
    assert told["missing_packages"] == {"gs": 1, "abfs": 1}
    first, second = told["warnings"]
    assert "gs://bucket/query.png: the protocol gs:// cannot be used" in first
    assert "pip install 'context-diffusion[gcs]'; 1 rows name it" in first
    assert "pip install 'context-diffusion[azure]'" in second
    few = job.model_copy(update={"manifest": str(manifest), "max_failed": 1})
    assert validate_job(few, 1)["exit"] == 4, "both rows would fail"


def test_validate_says_where_output_cannot_be_written_and_leaves_no_trace(tmp_path: Path, base: str) -> None:
    job = make_job(tmp_path, base)
    assert validate_job(job, 0)["creates_once"]
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    validate_job(job, 0)
    assert os.listdir(tmp_path / "out") == []
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file is in the way")
    with pytest.raises(StorageError, match="out cannot be written"):
        validate_job(job, 0)
    broken = make_job(tmp_path / "broken", base, {n: {"query": "gone.png"} for n in range(6)})
    with pytest.raises(ContextDiffusionError, match="no row of the sample could be loaded"):
        validate_job(broken, 6, str(tmp_path / "sheet.png"))
