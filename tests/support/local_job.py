"""A job's way through the flow's own stages and its own engine, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.stages.generate import generate
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import make_engine
from context_diffusion.storage.filesystem import Storage


def run_stages(job: GenerateJob) -> Iterator[pa.Table]:
    """Run a job's stages by its own engine, and yield each shard as it was loaded, after its part is
    written."""
    output = Output(job.output, Storage())
    plan = open_plan(job, output, Storage())
    reads, load, write = build_stages(plan, output, set(), frozenset())
    engine = GuardedEngine(make_engine(plan.job, pytest.fail), Ledger())
    for read in reads:
        [table] = read()
        loaded = load(table)
        write(generate(loaded, engine, plan.job))
        yield loaded


def run_job(job: GenerateJob) -> list[dict[str, Any]]:
    """Run a job's stages, and return the rows of its parts."""
    for _ in run_stages(job):
        pass
    parts = sorted(Path(job.output, "data").iterdir())
    return [row for part in parts for row in pq.read_table(part).to_pylist()]
