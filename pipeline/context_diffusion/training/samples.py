"""A picture of what the model makes of held-out rows: query, contexts, truth, output, a row each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from context_diffusion.config import Settings
from context_diffusion.engine.calls import Shape
from context_diffusion.engine.engine import Engine
from context_diffusion.images import resize
from context_diffusion.model.native import NativeModel
from context_diffusion.model.native_backbone import NativeBackbone
from context_diffusion.schema import Control, Request, Result
from context_diffusion.training.data import Pool, draw
from context_diffusion.training.state import writing


def pool_requests(pool: Pool, count: int, settings: Settings, prompts: bool = True) -> tuple[list[Request], NDArray[np.int64]]:
    """Rows of a pool, and the index of the picture that each should become."""
    batch = draw(pool, np.random.default_rng(11), count, 0.0, 0.5 if prompts else 1.0)
    requests = [
        Request(
            id=f"validation-{i}",
            index=0,
            query=pool.queries[batch.controls[i]],
            controls=(Control(pool.control_kinds[batch.controls[i]], pool.controls[batch.controls[i]]),),
            contexts=tuple(pool.targets[k] for k in batch.contexts[i][: batch.counts[i]]),
            prompt=batch.prompts[i] or None,
            negative_prompt=None,
            settings=settings.model_copy(update={"seed": i}),
        )
        for i in range(count)
    ]
    return requests, batch.targets


def make(model: NativeModel, requests: list[Request]) -> list[NDArray[np.uint8]]:
    """The engine's pictures, in the order of the requests; contexts of any size."""
    side, made = model.context_size, dict[str, NDArray[np.uint8]]()
    requests = [replace(one, contexts=tuple(resize(c, side, side, "crop") for c in one.contexts)) for one in requests]
    for request, outcome in Engine(NativeBackbone(model), model.device, Shape(4, 16)).run(requests):
        assert isinstance(outcome, Result), outcome
        made[request.id] = outcome.image
    return [made[request.id] for request in requests]


def save_samples(model: NativeModel, requests: list[Request], targets: list[NDArray[np.uint8]], path: Path) -> None:
    blank = np.full_like(targets[0], 128)
    rows = []
    for request, image, target in zip(requests, make(model, requests), targets, strict=True):
        contexts = [*request.contexts, blank, blank][:3]
        rows.append(np.concatenate([request.query, request.controls[0].pixels, *contexts, target, image], 1))
    half = len(rows) // 2
    page = Image.fromarray(np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], 1))
    with writing(path):
        page.save(path)
