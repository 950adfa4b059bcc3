"""Build a plan's stages: a read for each shard that is left, the loading, the writing. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.schema import CONTEXT_MASKS
from context_diffusion.core.uris import parent
from context_diffusion.generation.plan import Plan
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard, row_rules
from context_diffusion.generation.stages.write_shard import WriteShard
from context_diffusion.inputs.context_images import ContextPreprocessing, ReferenceImage
from context_diffusion.inputs.manifest_files import ManifestFile, partitions
from context_diffusion.inputs.rows import column_names
from context_diffusion.outputs.output_folder import Output

SHARDS, SHARDS_OF_KINDS = 2, 8  # that an engine works on at once: of rows of one kind, of several
# Rows that differ in one of these share no call of the model.
CALL_SETTINGS = ("width", "height", "lora", "lora_scale", CONTEXT_MASKS)


def shards_per_actor(job: GenerateJob, files: Iterable[ManifestFile], contexts: ContextPreprocessing) -> int:
    """Return the shards that one engine works on at once: the job's, else more where rows vary in size, LoRA
    or masks, since only rows that agree in these share a call of the model.

    files: of the plan. contexts: how the model's context images are prepared."""
    if job.cluster.shards_per_actor is not None:
        return job.cluster.shards_per_actor
    names = column_names(job.columns)
    columns = {names[name] for name in CALL_SETTINGS}
    by_query = job.fit == "keep" and not job.settings.width and not job.settings.height
    by_row = any(columns & {*file.columns, *partitions(file.uri)} for file in files)
    by_axis = not job.matrix.keys().isdisjoint(CALL_SETTINGS)
    by_reference = isinstance(contexts, ReferenceImage)  # of any size
    return SHARDS_OF_KINDS if by_query or by_row or by_axis or by_reference else SHARDS


def build_stages(
    plan: Plan, output: Output, finished: set[int], redo: frozenset[int]
) -> tuple[list[ReadShard], LoadImages, WriteShard]:
    """Return the stages before and after the engine.

    finished: shards that are left out; redo: finished shards of which only the failed rows are generated
    again."""
    rules = row_rules(plan.job, plan.model)
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
