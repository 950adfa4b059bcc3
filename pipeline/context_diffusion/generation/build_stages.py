"""Build a plan's stages: a read for each shard that is left, the loading, the writing. Starts nothing."""

from __future__ import annotations

from dataclasses import replace

from context_diffusion.core.uris import parent
from context_diffusion.generation.plan import Plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages import LoadImages, ReadShard
from context_diffusion.generation.write_shard import WriteShard
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.output_folder import Output


def build_stages(
    plan: Plan, output: Output, finished: set[int], redo: frozenset[int]
) -> tuple[list[ReadShard], LoadImages, WriteShard]:
    """Return what stands around the engine.

    finished: shards that are left out; redo: finished shards of which only the failed rows are generated
    again."""
    rules = RowRules.of_job(plan.job)
    reads = [
        ReadShard(
            rules,
            replace(file, groups=[]),
            shard,
            plan.passed,
            output.storage,
            output if shard.number in redo else None,
        )
        for number, file in enumerate(plan.files)
        for shard in read_shards(output, number)
        if shard.number not in finished
    ]
    load = LoadImages.for_job(plan.job, plan.model, plan.allow, output.storage)
    model = f"{plan.model.name}@{plan.model.revision}"
    return reads, load, WriteShard(plan.job, output, model, parent(plan.files[0].uri), redo)
