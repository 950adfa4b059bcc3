"""Downloads a job's weights into the cache of each node before engines need them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from context_diffusion.cluster.ray_session import ray_session
from context_diffusion.core.errors import EXIT_OK, classify
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.models.resolution.resolve import ResolvedModel, find_model


def warm(jobs: list[GenerateJob], address: str | None) -> dict[str, Any]:
    """Load each job's model once on each node that may have an engine, so that its files are cached and
    checked.

    Returns the nodes with the seconds that each took, and `exit`. Raises ModelError."""
    models = [find_model(job.model) for job in jobs]
    loaded: list[dict[str, Any]] = []
    with ray_session(jobs[0].cluster.num_cpus, address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpu_nodes = [node for node in nodes if node["Resources"].get("GPU")]
        pairs = [(node, model) for model in models for node in gpu_nodes or nodes]
        tasks = [_start(node, model, bool(gpu_nodes)) for node, model in pairs]
        for (node, model), task in zip(pairs, tasks, strict=True):
            address_of_node = node["NodeManagerAddress"]
            fields = {"node": node["NodeID"], "address": address_of_node, "model": model.name}
            try:
                loaded.append({**fields, "revision": model.revision, "seconds": ray.get(task)})
            except Exception as error:
                failure = classify(error)
                return {"nodes": loaded, **failure, "error": f"node {address_of_node}: {failure['error']}"}
    return {"nodes": loaded, "exit": EXIT_OK}


def _start(node: dict[str, Any], model: ResolvedModel, on_gpu: bool) -> Any:
    """Start the task that loads a model on a node."""
    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # No CPU and no GPU: running engines may have reserved all of them.
    return (
        ray.remote(num_cpus=0, max_retries=1)(_load)
        .options(scheduling_strategy=on_node)
        .remote(model, on_gpu)
    )


def _load(model: ResolvedModel, on_gpu: bool) -> float:
    """Load a model into main memory, in a process of the node. Returns the seconds.

    on_gpu: load the files that an engine on a GPU would load."""
    started = time.monotonic()
    on_this_node = find_model(model.parts or model.name, model.parts.revision if model.parts else None)
    if on_this_node.kind != "native" and on_this_node.parts is not None:
        import torch

        from context_diffusion.backbones import load_backbone

        parts = on_this_node.parts
        dtype = "bfloat16" if on_gpu and parts.dtype == "auto" else parts.dtype
        as_loaded = replace(on_this_node, parts=parts.model_copy(update={"dtype": dtype}))
        load_backbone(as_loaded, torch.device("cpu"))
    return round(time.monotonic() - started, 2)
