"""A job's weights into each node's cache, before any engine waits for them. At Ray's edge."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from context_diffusion.config import GenerateJob
from context_diffusion.errors import EXIT_OK, classify
from context_diffusion.model.source import Source, find_model
from context_diffusion.ray_session import ray_session


def warm(job: GenerateJob, address: str | None) -> dict[str, Any]:
    """Loads the model once on each node that may have an engine, so that its files are there and known to be whole.
    -> the nodes with the seconds that each took, `exit` in it. Raises ModelError."""
    found = find_model(job.model)
    with ray_session(job.cluster.num_cpus, address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        graphic = [node for node in nodes if node["Resources"].get("GPU")]
        tasks = [_start(node, found, bool(graphic)) for node in graphic or nodes]
        told: dict[str, Any] = {"model": found.name, "revision": found.revision, "nodes": []}
        for node, task in zip(graphic or nodes, tasks, strict=True):
            name = node["NodeManagerAddress"]
            try:
                told["nodes"].append({"node": node["NodeID"], "address": name, "seconds": ray.get(task)})
            except Exception as error:
                wrong = classify(error)
                return {**told, **wrong, "error": f"node {name}: {wrong['error']}"}
    return {**told, "exit": EXIT_OK}


def _start(node: dict[str, Any], found: Source, graphic: bool) -> Any:
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # No CPU and no GPU: engines may run already, and hold them all.
    return ray.remote(num_cpus=0, max_retries=1)(_load).options(scheduling_strategy=here).remote(found, graphic)


def _load(found: Source, graphic: bool) -> float:
    """In a node's process. Into main memory: the files are those that an engine of this kind of device will take."""
    started = time.monotonic()
    again = find_model(found.parts or found.name, found.parts.revision if found.parts else None)
    if again.folder is None and again.parts is not None:
        import torch

        from context_diffusion.model.stable_diffusion import load

        kind = "bfloat16" if graphic and again.parts.dtype == "auto" else again.parts.dtype
        load(again.parts.model_copy(update={"dtype": kind}), torch.device("cpu"))
    return round(time.monotonic() - started, 2)
