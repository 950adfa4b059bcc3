"""A manifest's whole way through the flow in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.generate import Engine, generate
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.generation.stages.write_shard import WriteShard
from context_diffusion.inputs.context_images import SquareCrop
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.fakes import FakeEngine
from support.manifests import job_values, write_manifest

STORAGE = Storage(deadline_s=1)


def make(
    folder: Path, count: int = 6, changes: dict[int, dict[str, Any]] | None = None, **more: Any
) -> tuple[GenerateJob, Output]:
    """A small manifest's way through the flow; changes: as write_manifest has them; more: as `flow` has
    it."""
    manifest = folder / "in" / "manifest.parquet"
    if not manifest.exists():
        write_manifest(folder / "in", count, changes)
    return flow(folder, manifest, **more)


def flow(
    folder: Path,
    manifest: Path,
    engine: Engine | None = None,
    written: list[dict[str, Any]] | None = None,
    **more: Any,
) -> tuple[GenerateJob, Output]:
    """The whole flow in this process, without Ray: what the graph of cluster/dataflow.py calls. written: gets
    what the driver would hear of each shard. more: the job's keys."""
    job = GenerateJob.model_validate(job_values(str(manifest), folder / "out", **more))
    output = Output(job.output, STORAGE)
    plan = open_plan(job, output, STORAGE)
    job = plan.job
    load = LoadImages(
        job.fit, job.control_kinds, job.limits, [str(folder / "in")], 64, SquareCrop(64), STORAGE
    )
    guarded = GuardedEngine(engine or FakeEngine(), Ledger())
    write = WriteShard(job, output, "fake@1", str(folder / "in"))
    for shard in read_shards(output, 0):
        [table] = ReadShard(RowRules.of_job(job), plan.files[0], shard, plan.passed, STORAGE)()
        told = write(generate(load(table), guarded, job)).to_pylist()
        if written is not None:
            written += told
    return job, output
