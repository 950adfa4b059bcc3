"""A job's weights into each node's cache, before any engine waits for them. At Ray's edge."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from context_diffusion.cluster.ray_session import ray_session
from context_diffusion.core.errors import EXIT_OK, classify
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.models.resolve import ResolvedModel, find_model


def warm(jobs: list[GenerateJob], address: str | None) -> dict[str, Any]:
    """Loads each job's model once on each node that may have an engine, so that its files are there and known to be whole.
    -> the nodes with the seconds that each took, `exit` in it. Raises ModelError."""
    models, told = [find_model(job.model) for job in jobs], list[dict[str, Any]]()
    with ray_session(jobs[0].cluster.num_cpus, address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        graphic = [node for node in nodes if node["Resources"].get("GPU")]
        pairs = [(node, found) for found in models for node in graphic or nodes]
        tasks = [_start(node, found, bool(graphic)) for node, found in pairs]
        for (node, found), task in zip(pairs, tasks, strict=True):
            named = {"node": node["NodeID"], "address": node["NodeManagerAddress"], "model": found.name}
            try:
                told.append({**named, "revision": found.revision, "seconds": ray.get(task)})
            except Exception as error:
                wrong = classify(error)
                return {"nodes": told, **wrong, "error": f"node {named['address']}: {wrong['error']}"}
    return {"nodes": told, "exit": EXIT_OK}


def _start(node: dict[str, Any], found: ResolvedModel, graphic: bool) -> Any:
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # No CPU and no GPU: engines may run already, and hold them all.
    return ray.remote(num_cpus=0, max_retries=1)(_load).options(scheduling_strategy=here).remote(found, graphic)


def _load(found: ResolvedModel, graphic: bool) -> float:
    """In a node's process. Into main memory: the files are those that an engine of this kind of device will take."""
    started = time.monotonic()
    again = find_model(found.parts or found.name, found.parts.revision if found.parts else None)
    if again.folder is None and again.parts is not None:
        import torch

        from context_diffusion.models.stable_diffusion.loading import load

        kind = "bfloat16" if graphic and again.parts.dtype == "auto" else again.parts.dtype
        load(again.parts.model_copy(update={"dtype": kind}), torch.device("cpu"))
    return round(time.monotonic() - started, 2)
