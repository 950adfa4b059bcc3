"""Rows for bench_gpu.py. Stable Diffusion: uniform guided ones, unguided ones, mixed steps and guidance,
mixed sizes. FLUX.2 [klein]: uniform ones, ones that share references, mixed steps, references, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from context_diffusion.core.records import Pixels, Request
from context_diffusion.pipeline import ContextDiffusion

KINDS = ("uniform", "unguided", "mixed", "mixed sizes")
KLEIN_KINDS = (
    "uniform",
    "shared references",
    "mixed steps",
    "mixed references",
    "mixed sizes",
    "mixed steps and references",
)
GUIDANCE, CONTEXTS = 5.0, 2
PROMPTS = ("a house by the sea", "a misty forest", "an old street at night", "flowers in a glass vase")
# Heights and widths in eighths of the output's usual side: of the query and the contexts, and of outputs.
Sizes = tuple[tuple[int, int], ...]
REFERENCES: Sizes = ((8, 8), (4, 4), (4, 4))
MIXED_REFERENCES: tuple[Sizes, ...] = (
    ((8, 8), (4, 4), (4, 5)),
    ((6, 7), (4, 5)),
    ((5, 6), (4, 4), (4, 4), (4, 4)),
    ((8, 8), (7, 7)),
    ((7, 8), (5, 6), (4, 4)),
    ((6, 6), (5, 5)),
    ((5, 5), (4, 6), (5, 5)),
    ((7, 7), (7, 7), (4, 5)),
)
OUTPUTS: Sizes = ((8, 8), (6, 10), (10, 6))
EIGHTHS = 8


def stable_diffusion_rows(model: ContextDiffusion, kind: str, count: int, steps: int) -> list[Request]:
    """Make requests as the Python API does, of random images; each row has its own query and contexts."""
    rng, side = np.random.default_rng(0), model.backbone.image_size
    sizes = [(side, side), (side, 3 * side // 2), (3 * side // 2, side)]
    rows: list[Request] = []
    for number in range(count):
        mixed = kind == "mixed"
        height, width = sizes[number % len(sizes)] if kind == "mixed sizes" else sizes[0]
        images = [_image(rng, (side // 2, side // 2)) for _ in range(1 + CONTEXTS)]
        guidance = float(rng.choice([1.0, GUIDANCE])) if mixed else 1.0 if kind == "unguided" else GUIDANCE
        settings = {
            "seed": number,
            "num_inference_steps": int(rng.integers(steps * 2 // 3, steps * 5 // 3)) if mixed else steps,
            "guidance_scale": guidance,
            "scheduler": "ddim",
            "height": height,
            "width": width,
        }
        rows.append(_request(model, number, images, "canny", settings))
    return rows


def klein_rows(model: ContextDiffusion, kind: str, count: int, steps: int, side: int) -> list[Request]:
    """Make requests as the Python API does, of random images; each row has its own query and contexts but
    where they are shared. Mixed steps are 2 to twice as many as `steps`.

    side: of an output of the usual size, in pixels."""
    rng, unit = np.random.default_rng(0), side // EIGHTHS
    mixed_steps = kind in ("mixed steps", "mixed steps and references")
    references = (
        MIXED_REFERENCES if kind in ("mixed references", "mixed steps and references") else [REFERENCES]
    )
    outputs = OUTPUTS if kind == "mixed sizes" else OUTPUTS[:1]
    rows: list[Request] = []
    images: list[Pixels] = []
    for number in range(count):
        if not images or kind != "shared references":
            sizes = references[number % len(references)]
            images = [_image(rng, (height * unit, width * unit)) for height, width in sizes]
        height, width = outputs[number % len(outputs)]
        settings = {
            "seed": number,
            "num_inference_steps": int(rng.integers(2, 2 * steps + 1)) if mixed_steps else steps,
            "height": height * unit,
            "width": width * unit,
        }
        rows.append(_request(model, number, images, None, settings))
    return rows


def _image(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Draw coarse noise of a (height, width), so that a control map is more than noise."""
    height, width = size
    coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def _request(
    model: ContextDiffusion,
    number: int,
    images: Sequence[Pixels],
    control: str | None,
    settings: dict[str, Any],
) -> Request:
    query, *contexts = images
    prompt = PROMPTS[number % len(PROMPTS)]
    [request] = model.requests(query, contexts, prompt, None, control, "crop", settings)
    return replace(request, id=str(number))
