"""The Ray Data flow with a fake engine; the driver's cost of a plan; import time.

python tests/benchmarks/flow.py [--rows 400] [--shards 10000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_diffusion.cluster.driver import Options, run_generate
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.manifests import job_values


def write_input(folder: Path, rows: int) -> str:
    """512 x 512 JPEG queries, three contexts each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(40)]
    for name in names:
        coarse = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(folder / name, quality=92)
    table = pa.table(
        {
            "id": [f"{number:06d}" for number in range(rows)],
            "query": [names[number % 40] for number in range(rows)],
            "context": [[names[(number + k) % 40] for k in (1, 2, 3)] for number in range(rows)],
        }
    )
    pq.write_table(table, folder / "manifest.parquet")
    return str(folder / "manifest.parquet")


def flow(folder: Path, rows: int) -> None:
    os.environ["PYTHONPATH"] = sys.path[0]  # Ray's workers import the engine of fakes.py
    from support import fakes

    job = GenerateJob.model_validate(job_values(write_input(folder / "in", rows), folder / "out"))
    summary = run_generate(job, Options(), fakes.quick)
    logged = json.loads(Path(folder / "out" / "summary.json").read_text())
    print(
        f"flow: {rows} rows in {summary['seconds']} s with Ray's start, {rows / logged['seconds']:.1f} rows/s"
    )


def plan(folder: Path, shards: int) -> None:
    folder.mkdir()
    table = pa.table(
        {
            "id": [str(n) for n in range(shards * 64)],
            "query": ["q.png"] * (shards * 64),
            "context": [["c.png"]] * (shards * 64),
        }
    )
    pq.write_table(table, folder / "manifest.parquet", row_group_size=64_000)
    job = GenerateJob.model_validate(job_values(str(folder / "manifest.parquet"), folder / "out"))
    storage, before = Storage(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output, started = Output(job.output, storage), time.perf_counter()
    planned = open_plan(job, output, storage)
    made = time.perf_counter()
    reads = [
        ReadShard(RowRules.of_job(job), planned.files[0], shard, planned.passed, storage)
        for shard in read_shards(output, 0)
    ]
    done = time.perf_counter()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"plan: {len(reads)} shards of 64 rows: {(made - started) / shards * 1e3:.2f} ms a shard to plan, "
        f"{(done - made) / shards * 1e3:.3f} ms a shard for its read task, {grown:.0f} MiB more at the peak"
    )


def imports() -> None:
    for module in ("context_diffusion", "context_diffusion.cli.main"):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            seconds.append(time.perf_counter() - started)
        print(f"import {module}: {sorted(seconds)[2]:.2f} s, Python's own start included")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, default=400)
    arguments.add_argument("--shards", type=int, default=10_000)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        imports()
        plan(Path(folder) / "plan", given.shards)
        flow(Path(folder) / "flow", given.rows)
