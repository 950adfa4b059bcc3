"""A job of FLUX.2 [klein] over files of any size and format, by the flow's own stages without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.stages import generate
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import make_engine
from context_diffusion.storage.filesystem import Storage
from support.tiny_flux2 import tiny_images

# By number, as `write_job` names them.
FILES = (
    ("0.png", (100, 70)),
    ("1.jpg", (64, 128)),
    ("2.png", (300, 200)),
    ("3.jpg", (97, 81)),
    ("4.webp", (80, 80)),
    ("5.png", (64, 64)),
    ("small.png", (100, 63)),
    ("long.jpg", (1032, 128)),
    ("panorama.png", (512, 64)),
)


def write_job(folder: Path, model: Any, lines: list[dict[str, Any]], **keys: Any) -> GenerateJob:
    """Write FILES and a manifest of rows, and return its job. keys: further ones of the job."""
    for number, (name, size) in enumerate(FILES):
        tiny_images(1, [size], seed=number)[0].save(folder / name)
    rows = [{"id": f"row-{number}", **line} for number, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"kind": "generate", "manifest": str(folder / "rows.jsonl"), "output": str(folder / "out")}
    return GenerateJob.model_validate(values | {"model": model, **keys})


def run_job(job: GenerateJob) -> list[dict[str, Any]]:
    """Run a job's stages by its own engine, and return the rows of its parts."""
    output = Output(job.output, Storage())
    plan = open_plan(job, output, Storage())
    reads, load, write = build_stages(plan, output, set(), frozenset())
    engine = GuardedEngine(make_engine(plan.job, pytest.fail), Ledger())
    for read in reads:
        [table] = read()
        write(generate(load(table), engine, plan.job))
    parts = sorted(Path(job.output, "data").iterdir())
    return [row for part in parts for row in pq.read_table(part).to_pylist()]
