"""The feed of an engine, by what a plan knows of its manifest's columns; and chunks that no device has."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.build_stages import build_stages, shards_per_actor
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.validate import validate_job
from context_diffusion.inputs.context_images import ReferenceImage, SquareCrop
from context_diffusion.inputs.manifest_files import ManifestFile
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values, write_manifest

STORAGE = Storage(deadline_s=1)


def job(manifest: str, output: Path, **more: Any) -> GenerateJob:
    return GenerateJob.model_validate(job_values(manifest, output, **more))


def write_row(folder: Path, form: str, **more: Any) -> str:
    """A manifest of one row."""
    row = {"query": "a.png", "context": "b.png", **more}
    path = folder / f"manifest.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif form == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
    return str(path)


@pytest.mark.parametrize(
    ("keys", "row", "shards"),
    [
        ({}, {}, 2),
        ({}, {"width": 64}, 8),
        ({}, {"wide": 64}, 2),
        ({"columns": {"height": "tall"}}, {"tall": 64}, 8),
        ({"columns": {"height": "tall"}}, {"tall": 64, "height": 64}, 8),
        ({}, {"lora": "ink"}, 8),
        ({"columns": {"context_masks": "where"}}, {"where": "mask.png"}, 8),
        ({"fit": "keep"}, {}, 8),
        ({"fit": "keep", "settings": {"width": 64}}, {}, 2),
        ({"fit": "keep", "cluster": {"shards_per_actor": 3}}, {"width": 64}, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_an_engine_has_more_shards_where_rows_share_fewer_calls(
    tmp_path: Path, form: str, keys: dict[str, Any], row: dict[str, Any], shards: int
) -> None:
    output = Output(str(tmp_path / "out"), STORAGE)
    plan = open_plan(job(write_row(tmp_path, form, **row), tmp_path / "out", **keys), output, STORAGE)
    reads, _, _ = build_stages(plan, output, set(), frozenset())
    assert shards_per_actor(plan.job, [read.file for read in reads], SquareCrop(64)) == shards


def test_a_size_that_folders_name_is_a_column(tmp_path: Path) -> None:
    file = ManifestFile(f"{tmp_path}/width=64/m.parquet", "parquet", ["query", "context"], [1])
    assert shards_per_actor(job("m.parquet", tmp_path / "out"), [file], SquareCrop(64)) == 8


def test_references_have_any_size(tmp_path: Path) -> None:
    file = ManifestFile(f"{tmp_path}/m.parquet", "parquet", ["query", "context"], [1])
    assert shards_per_actor(job("m.parquet", tmp_path / "out"), [file], ReferenceImage(1024**2)) == 8


CHUNKS_THERE = [{"chunk": 4}, {"chunk": 32}, {"chunk": 4, "gpus_per_actor": 0}]
CHUNKS_NOWHERE = [{"chunk": 5}, {"chunk": 6}, {"chunk": 32, "gpus_per_actor": 0}]  # SDXL has 6


@pytest.mark.parametrize("cluster", CHUNKS_THERE, ids=str)
def test_a_chunk_that_the_engines_device_may_have_is_planned(tmp_path: Path, cluster: dict[str, Any]) -> None:
    wanted = job(write_manifest(tmp_path / "in", 2), tmp_path / "out", cluster=cluster)
    assert open_plan(wanted, Output(wanted.output, STORAGE), STORAGE).job.cluster.chunk == cluster["chunk"]


@pytest.mark.parametrize("cluster", CHUNKS_NOWHERE, ids=str)
def test_a_chunk_that_no_device_has_is_refused_before_anything_is_planned(
    tmp_path: Path, cluster: dict[str, Any]
) -> None:
    wanted = job(write_manifest(tmp_path / "in", 2), tmp_path / "out", cluster=cluster)
    words = rf"cluster.chunk: {cluster['chunk']} is not a size of a chunk.* native on cpu: 1, 2, 3, 4"
    with pytest.raises(ConfigError, match=words):
        open_plan(wanted, Output(wanted.output, STORAGE), STORAGE)
    with pytest.raises(ConfigError, match=words):
        validate_job(wanted, 1)
    assert not (tmp_path / "out").exists()
