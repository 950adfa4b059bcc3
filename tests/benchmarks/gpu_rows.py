"""Rows for bench_gpu.py: uniform guided ones, unguided ones, mixed steps and guidance, mixed sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from context_diffusion.core.records import Request
from context_diffusion.pipeline import ContextDiffusion

KINDS = ("uniform", "unguided", "mixed", "mixed sizes")
GUIDANCE, CONTEXTS = 5.0, 2
PROMPTS = ("a house by the sea", "a misty forest", "an old street at night", "flowers in a glass vase")


def make_rows(model: ContextDiffusion, kind: str, count: int, steps: int) -> list[Request]:
    """Make requests as the Python API does, of random images; each row has its own query and contexts."""
    rng, side = np.random.default_rng(0), model.backbone.image_size
    sizes = [(side, side), (side, 3 * side // 2), (3 * side // 2, side)]
    rows: list[Request] = []
    for number in range(count):
        mixed = kind == "mixed"
        height, width = sizes[number % len(sizes)] if kind == "mixed sizes" else sizes[0]
        # Coarse noise, so that a control map is more than noise.
        coarse = rng.integers(0, 256, (1 + CONTEXTS, side // 16, side // 16, 3), dtype=np.uint8)
        query, *contexts = coarse.repeat(8, 1).repeat(8, 2)
        guidance = float(rng.choice([1.0, GUIDANCE])) if mixed else 1.0 if kind == "unguided" else GUIDANCE
        settings = {
            "seed": number,
            "num_inference_steps": int(rng.integers(steps * 2 // 3, steps * 5 // 3)) if mixed else steps,
            "guidance_scale": guidance,
            "scheduler": "ddim",
            "height": height,
            "width": width,
        }
        prompt = PROMPTS[number % len(PROMPTS)]
        [request] = model.requests(query, contexts, prompt, None, "canny", "crop", settings)
        rows.append(replace(request, id=str(number)))
    return rows
