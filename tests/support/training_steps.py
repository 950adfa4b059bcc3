"""One step of the second stage on a small pool, without files: for tests of what a step changes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from context_diffusion.core.training_job import Architecture, TrainJob
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.encoded_pools import encode_pool
from context_diffusion.training.data.pools import Pool, make_pool
from context_diffusion.training.diffusion import Run


@cache
def pool(size: int) -> Pool:
    return make_pool(3, 4, 4, size)


def changed_by_a_step(model: NativeModel, sizes: Architecture, folder: Path, batch_size: int = 4) -> set[str]:
    """Takes one step in place; -> the components whose weights it changed. Raises where the loss is not
    finite."""
    stage: dict[str, Any] = {"batch_size": batch_size, "context_dropout": 0.0}
    job = TrainJob.model_validate(
        {
            "kind": "train",
            "output": str(folder),
            "max_steps": 1,
            "diffusion": stage,
            "architecture": sizes.model_dump(),
        }
    )
    before = {
        name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in model.modules.items()
    }
    run = Run(job, model, folder, {})
    loss = run.train_step(encode_pool(model, pool(sizes.image_size)))
    assert torch.isfinite(loss)
    model.eval()
    for module in run.modules.values():  # back from channels last, whose last bits differ
        module.to(memory_format=torch.contiguous_format)
    after = {name: module.state_dict() for name, module in model.modules.items()}
    return {
        name
        for name, values in before.items()
        if any(not torch.equal(v, after[name][k]) for k, v in values.items())
    }
