"""A manifest of many sizes: calls of the model stay full, since the engine has rows of each size at hand.

A real engine and a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.build_stages import build_stages, shards_per_actor
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.stages.generate import generate
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import make_engine
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values, write_pictures
from support.output_reader import read_output
from support.processes import drive
from support.user_images import write_base

SIZES = list(product((64, 80, 96), repeat=2))


def job_of_sizes(folder: Path, count: int) -> dict[str, Any]:
    """A job with so many rows of each size, each size in every shard; a row takes one lane or two."""
    names = write_pictures(folder / "in")
    table = [
        {
            "id": f"row-{number:03d}",
            "query": names[number % len(names)],
            "context": [names[(number + 1) % len(names)]],
            "width": SIZES[number % len(SIZES)][0],
            "height": SIZES[number % len(SIZES)][1],
            "prompt": "ocean" if number // len(SIZES) % 2 else None,
        }
        for number in range(count * len(SIZES))
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "in" / "manifest.parquet")
    model = write_base(folder / "model")
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    manifest = str(folder / "in" / "manifest.parquet")
    cluster = {"no_progress_timeout_s": 600}  # a shard ends when its last size does, all of them near the end
    return job_values(manifest, folder / "out", model=model, settings=settings, cluster=cluster)


def check_images(folder: Path, count: int) -> None:
    rows = read_output(folder)
    assert Counter((row["width"], row["height"]) for row in rows) == dict.fromkeys(SIZES, count)
    assert {row["lanes"] for row in rows} == {1, 2}


@pytest.mark.parametrize(("count", "least"), [(8, 0.9), pytest.param(32, 0.95, marks=pytest.mark.slow)])
def test_an_engine_fed_by_the_plan_has_full_calls_of_nine_sizes(
    tmp_path: Path, count: int, least: float
) -> None:
    """Without Ray: the stages in threads, as many shards at once as the flow gives to an engine."""
    job = GenerateJob.model_validate(job_of_sizes(tmp_path, count))
    output = Output(job.output, Storage(deadline_s=1))
    plan = open_plan(job, output, output.storage)
    reads, load, write = build_stages(plan, output, set(), frozenset())
    engine = GuardedEngine(make_engine(plan.job, lambda error: None), Ledger())

    def run(read: ReadShard) -> dict[str, Any]:
        [table] = read()
        [written] = write(generate(load(table), engine, plan.job)).to_pylist()
        return dict(written)

    shards = shards_per_actor(plan.job, plan.files, plan.model.contexts)
    assert (len(reads), shards) == (8, 8)
    with ThreadPoolExecutor(shards) as pool:
        written = list(pool.map(run, reads))
    check_images(tmp_path / "out", count)
    used, paid = (sum(shard[f"{name}_lane_steps"] for shard in written) for name in ("used", "paid"))
    assert used / paid >= least


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_job_of_nine_sizes_has_full_calls(tmp_path: Path) -> None:
    summary = drive(job_of_sizes(tmp_path, 32), "native")
    assert (summary["exit"], summary["ok"]) == (0, 32 * len(SIZES))
    check_images(tmp_path / "out", 32)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["occupancy"] >= 0.95
