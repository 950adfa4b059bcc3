"""Parts and pictures: formats, names, the first committer, metadata that makes a picture again."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.schema import FAILURES_TOLD, OUTPUT
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.generate import generate
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.generation.stages.write_shard import WriteShard
from context_diffusion.inputs.context_images import SquareCrop
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.encode import read_metadata
from context_diffusion.outputs.finalize import close, verify
from context_diffusion.outputs.image_files import safe_name
from context_diffusion.outputs.output_folder import Output, members, to_tar
from support.fakes import FakeEngine
from support.finished_output import STORAGE, make
from support.manifests import job_values, write_manifest
from support.output_reader import read_output


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_each_format_stores_the_picture_and_how_to_make_it_again(tmp_path: Path, form: str) -> None:
    make(tmp_path, image_format=form, settings={"num_images": 2})
    rows = read_output(tmp_path / "out")
    assert [(row["id"], row["index"]) for row in rows] == [
        (f"row-{n:03d}", k) for n in range(6) for k in range(2)
    ]
    for row in rows:
        data = (tmp_path / "out" / row["file_name"]).read_bytes()
        assert Image.open(io.BytesIO(data)).format == form.upper()
        told = json.loads(read_metadata(data)["context_diffusion"])
        assert (told["id"], told["seed"], told["prompt"] if row["prompt"] else None) == (
            row["id"],
            row["seed"],
            row["prompt"],
        )
        assert told["context"] == row["context"]
    assert rows[1]["seed"] == rows[0]["seed"] + 1
    assert not np.array_equal(rows[0]["pixels"], rows[1]["pixels"])


def test_pictures_in_the_parquet_alone_open_in_datasets_duckdb_and_pandas(tmp_path: Path) -> None:
    import duckdb
    import pandas as pd
    from datasets import load_dataset

    make(tmp_path, image_format="none")
    assert not (tmp_path / "out" / "images").exists()
    files = str(tmp_path / "out" / "data" / "*.parquet")
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded[0]["image"], Image.Image)
    assert loaded[0]["image"].size == (64, 64)
    assert duckdb.sql(f"select count(*), min(author) from '{files}' where status = 'ok'").fetchall() == [
        (6, "person 0")
    ]
    frame = pd.read_parquet(tmp_path / "out" / "data")
    assert frame.loc[frame.status == "ok", "author"].value_counts()["person 0"] == 2
    assert Image.open(io.BytesIO(frame.image[0]["bytes"])).size == (64, 64)
    row = pq.read_table(tmp_path / "out" / "data").to_pylist()[0]
    assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == row["sha256"]


def test_pictures_in_files_load_as_an_image_folder(tmp_path: Path) -> None:
    from datasets import load_dataset

    _, output = make(tmp_path, 10, {3: {"query": "gone.png"}}, rows_per_part=4)
    close(output)
    loaded = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out" / "images"), split="train", cache_dir=str(tmp_path / "c")
    )
    rows = {row["id"]: row for row in read_output(tmp_path / "out") if row["status"] == "ok"}
    assert len(loaded) == len(rows) == 9
    for row in loaded:
        assert np.array_equal(np.asarray(row["image"]), rows[row["id"]]["pixels"])
        assert row["author"] == rows[row["id"]]["author"]


def test_pictures_in_both_places_are_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path, output_format="both", image_format="webp")
    for row in read_output(tmp_path / "out"):
        assert row["image"] == {
            "bytes": (tmp_path / "out" / row["file_name"]).read_bytes(),
            "path": row["file_name"],
        }


def test_a_tar_a_part_reads_with_the_webdataset_package(tmp_path: Path) -> None:
    import webdataset

    changes = {0: {"id": "a.b/c"}, 1: {"id": "a_b/c"}, 2: {"query": "gone.png"}}
    _, output = make(
        tmp_path, 10, changes, output_format="webdataset", settings={"num_images": 2}, rows_per_part=4
    )
    tars = sorted(str(path) for path in (tmp_path / "out" / "webdataset").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    rows = {
        (row["id"], row["index"]): row
        for _, part in output.read_parts()
        for row in part.to_pylist()
        if row["status"] == "ok"
    }
    assert len(tars) == 3
    assert len(samples) == len(rows) == 18
    for sample in samples:
        row = rows[sample["json"]["id"], sample["json"]["index"]]
        assert sample["json"]["sha256"] == row["sha256"] == hashlib.sha256(output.image(row)).hexdigest()
        assert sample["png"].shape == (row["height"], row["width"], 3)
    assert not (tmp_path / "out" / "images").exists()


def test_who_comes_second_takes_the_earlier_tar_s_pictures_and_adds_what_it_lacks(tmp_path: Path) -> None:
    _, output = make(tmp_path, output_format="webdataset")
    tar = tmp_path / "out" / "webdataset" / "part-00000.tar"
    files = dict(members(tar.read_bytes()))
    names = [name for name in files if name.endswith(".png")]
    earlier = {
        name: data for name, data in files.items() if not name.startswith(names[1].removesuffix("png"))
    }
    earlier[names[0]] = b"the picture of another device"
    tar.write_bytes(to_tar(earlier))
    (tmp_path / "out" / "data" / "part-00000.parquet").unlink()
    _, output = make(tmp_path, output_format="webdataset")
    assert dict(members(tar.read_bytes())) == files | {names[0]: b"the picture of another device"}
    for _, part in output.read_parts():
        assert all(hashlib.sha256(output.image(row)).hexdigest() == row["sha256"] for row in part.to_pylist())


@pytest.mark.parametrize("form", ["files", "webdataset"])
def test_a_flipped_byte_in_any_file_is_found(tmp_path: Path, form: str) -> None:
    _, output = make(tmp_path, output_format=form)
    output.storage.replace(output.summary, b"{}")
    output.storage.replace(output.report, b"<html>")
    close(output)
    assert verify(output) == []
    for path in (path for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert len(found := verify(output)) == 1, path
        assert path.name in found[0]
        path.write_bytes(data)
    (tmp_path / "out" / "data" / "part-00009.parquet").write_bytes(b"")
    next((tmp_path / "out" / "plan").iterdir()).unlink()
    assert [line.split(": ")[-1] for line in verify(output)] == ["missing", "does not belong to this job"]


def test_every_part_has_the_same_schema_failed_rows_or_not(tmp_path: Path) -> None:
    make(
        tmp_path,
        9,
        {
            0: {"query": "gone.png"},
            1: {"scheduler": "magic"},
            2: {"context": []},
            3: {"num_inference_steps": 0},
        },
    )
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out" / "data").glob("*"))]
    assert len(schemas) > 1
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert [f.name for f in schemas[0]] == [f.name for f in OUTPUT if f.name != "image"] + ["author"]


def test_who_comes_second_changes_nothing_and_a_picture_that_is_there_gives_its_checksum(
    tmp_path: Path,
) -> None:
    make(tmp_path)
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    make(tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    part, picture = sorted(out.glob("data/*"))[0], sorted(out.rglob("*.png"))[0]
    part.unlink()
    earlier = Image.new("RGB", (64, 64), (1, 2, 3))
    earlier.save(picture)
    make(tmp_path)
    assert pq.read_table(part)["sha256"][0].as_py() == hashlib.sha256(picture.read_bytes()).hexdigest()


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_file_names_are_safe_and_different(first: str, second: str) -> None:
    names = [safe_name(first), safe_name(second)]
    for name in names:
        assert 0 < len(name) < 120
        assert not set(name) & set('/\\\0:*?"<>|')
        assert not name.startswith(".")
    if first != second:
        assert names[0].lower() != names[1].lower()


def test_columns_named_like_ours_are_kept_under_another_name(tmp_path: Path) -> None:
    manifest = Path(write_manifest(tmp_path / "in", 4))
    table = pq.read_table(manifest).append_column("sha256", pa.array([1, 2, 3, 4]))
    pq.write_table(table, manifest)
    job = GenerateJob.model_validate(job_values(str(manifest), tmp_path / "out"))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    job = plan.job
    [shard] = read_shards(output, 0)
    [read] = ReadShard(RowRules.of_job(job), plan.files[0], shard, plan.passed, STORAGE)()
    assert read["passed:manifest_sha256"].to_pylist() == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["files", "parquet", "both"])
def test_the_driver_hears_what_a_shard_was(tmp_path: Path, form: str) -> None:
    changes: dict[int, dict[str, Any]] = {
        1: {"scheduler": "magic"},
        2: {"query": "gone.png"},
        7: {"context": []},
    }
    heard: list[dict[str, Any]] = []
    make(tmp_path, 8, changes, written=heard, rows_per_part=4, settings={"num_images": 2}, output_format=form)
    first, second = heard
    assert [(one["shard"], one["rows"], one["failed"], one["images"]) for one in heard] == [
        (0, 4, 2, 4),
        (1, 4, 1, 6),
    ]
    assert [(one["rows_made"], one["images_made"]) for one in heard] == [(4, 4), (4, 6)]
    assert dict(first["codes"]) == {"unknown_scheduler": 1, "missing_file": 1}
    assert [(one["id"], one["code"]) for one in first["failures"]] == [
        ("row-001", "unknown_scheduler"),
        ("row-002", "missing_file"),
    ]
    assert "gone.png" in first["failures"][1]["message"]
    on_disk = [path for folder in ("data", "images") for path in (tmp_path / "out").glob(f"{folder}/**/*.p*")]
    assert first["bytes"] + second["bytes"] == sum(path.stat().st_size for path in on_disk if path.is_file())
    load, made, wrote = (first[f"{stage}_span"] for stage in ("load", "generate", "write"))
    assert load["began"] <= made["began"] <= wrote["began"]
    assert all(span["seconds"] > 0 for span in (load, made, wrote))


def test_of_rows_made_anew_the_driver_hears_them_alone_beside_the_whole_part(tmp_path: Path) -> None:
    job, output = make(
        tmp_path, 4, {1: {"query": "later.png"}, 3: {"context": []}}, settings={"num_images": 2}
    )
    (tmp_path / "in" / "later.png").write_bytes((tmp_path / "in" / "picture-0.png").read_bytes())
    plan = open_plan(job, output, STORAGE)
    job = plan.job
    load, write = (
        LoadImages(
            job.fit, job.control_kinds, job.limits, [str(tmp_path / "in")], 64, SquareCrop(64), STORAGE
        ),
        WriteShard(job, output, "fake@1", str(tmp_path / "in"), redo=frozenset({0})),
    )
    [shard] = read_shards(output, 0)
    [table] = ReadShard(RowRules.of_job(job), plan.files[0], shard, plan.passed, STORAGE, output)()
    [told] = write(generate(load(table), GuardedEngine(FakeEngine(), Ledger()), job)).to_pylist()
    assert [told[name] for name in ("rows", "failed", "images")] == [4, 1, 6]
    assert [told[name] for name in ("rows_made", "images_made")] == [2, 2]
    assert [one["id"] for one in told["failures"]] == ["row-003"]


def test_not_every_failed_row_of_a_rotten_shard_is_told(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    make(tmp_path, 176, {number: {"context": []} for number in range(176)}, written=heard)
    told = heard[0]
    assert (told["failed"], dict(told["codes"]), len(told["failures"])) == (
        22,
        {"no_context": 22},
        FAILURES_TOLD,
    )
