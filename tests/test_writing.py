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

from context_diffusion.config import GenerateJob
from context_diffusion.encoding import read_metadata
from context_diffusion.ledger import GuardedEngine, Ledger
from context_diffusion.output import Output
from context_diffusion.plan import open_plan, read_shards
from context_diffusion.report import write_report
from context_diffusion.schema import OUTPUT
from context_diffusion.stages import LoadImages, ReadShard, generate
from context_diffusion.storage import Storage
from context_diffusion.writing import WriteShard, safe_name
from fakes import FakeEngine
from independent import read_output
from inputs import job_values, write_manifest

STORAGE = Storage(deadline_s=1)


def make(
    folder: Path, count: int = 6, changes: dict[int, dict[str, Any]] | None = None, **more: Any
) -> tuple[GenerateJob, Output]:
    """The whole flow in this process, without Ray: what the graph of dataflow.py calls."""
    manifest = folder / "in" / "manifest.parquet"
    if not manifest.exists():
        write_manifest(folder / "in", count, changes)
    job = GenerateJob.model_validate(job_values(str(manifest), folder / "out", **more))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    load = LoadImages(job, [str(folder / "in")], 64, 64, STORAGE)
    engine = GuardedEngine(FakeEngine(), Ledger(), job)
    write = WriteShard(job, output, "fake@1")
    for shard in read_shards(output, 0):
        [table] = ReadShard(job, plan.files[0], shard, plan.passed, STORAGE)()
        write(generate(load(table), engine, job))
    return job, output


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_each_format_stores_the_picture_and_how_to_make_it_again(tmp_path: Path, form: str) -> None:
    make(tmp_path, image_format=form, settings={"num_images": 2})
    rows = read_output(tmp_path / "out")
    assert [(row["id"], row["index"]) for row in rows] == [(f"row-{n:03d}", k) for n in range(6) for k in range(2)]
    for row in rows:
        data = (tmp_path / "out" / row["file_name"]).read_bytes()
        assert Image.open(io.BytesIO(data)).format == form.upper()
        told = json.loads(read_metadata(data)["context_diffusion"])
        assert (told["id"], told["seed"], told["prompt"] if row["prompt"] else None) == (row["id"], row["seed"], row["prompt"])
        assert told["context"] == row["context"]
    assert rows[1]["seed"] == rows[0]["seed"] + 1
    assert not np.array_equal(rows[0]["pixels"], rows[1]["pixels"])


def test_pictures_in_the_parquet_alone_open_in_datasets_and_duckdb(tmp_path: Path) -> None:
    import duckdb
    from datasets import load_dataset

    make(tmp_path, image_format="none")
    assert not (tmp_path / "out" / "images").exists()
    files = str(tmp_path / "out" / "data" / "*.parquet")
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded[0]["image"], Image.Image)
    assert loaded[0]["image"].size == (64, 64)
    assert duckdb.sql(f"select count(*), min(author) from '{files}' where status = 'ok'").fetchall() == [(6, "person 0")]
    row = pq.read_table(tmp_path / "out" / "data").to_pylist()[0]
    assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == row["sha256"]


def test_every_part_has_the_same_schema_failed_rows_or_not(tmp_path: Path) -> None:
    make(tmp_path, 9, {0: {"query": "gone.png"}, 1: {"scheduler": "magic"}, 2: {"context": []}, 3: {"num_inference_steps": 0}})
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out" / "data").glob("*"))]
    assert len(schemas) > 1
    assert all(schema.equals(schemas[0]) for schema in schemas)
    assert [f.name for f in schemas[0]] == [f.name for f in OUTPUT if f.name != "image"] + ["author"]


def test_who_comes_second_changes_nothing_and_a_picture_that_is_there_gives_its_checksum(tmp_path: Path) -> None:
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


def test_the_report_escapes_what_a_manifest_says(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    _, output = make(tmp_path, changes={0: {"prompt": attack}, 1: {"id": attack}, 2: {"scheduler": attack}})
    counts = output.count()
    write_report(output, {**vars(counts), "output": attack, "seconds": 1, "images_per_second": 1})
    page = Path(output.report).read_text()
    assert attack not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3
    assert page.count("data:image/webp") >= 10


def test_columns_named_like_ours_are_kept_under_another_name(tmp_path: Path) -> None:
    manifest = Path(write_manifest(tmp_path / "in", 4))
    table = pq.read_table(manifest).append_column("sha256", pa.array([1, 2, 3, 4]))
    pq.write_table(table, manifest)
    job = GenerateJob.model_validate(job_values(str(manifest), tmp_path / "out"))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    [shard] = read_shards(output, 0)
    [read] = ReadShard(job, plan.files[0], shard, plan.passed, STORAGE)()
    assert read["passed:manifest_sha256"].to_pylist() == [1, 2, 3, 4]
