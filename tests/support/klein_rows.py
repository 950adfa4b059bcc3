"""Rows of FLUX.2 [klein] by our engine, and the same rows by diffusers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from context_diffusion.core.records import Failure, Pixels, Request, Result
from context_diffusion.pipeline import ContextDiffusion
from support.diffusers_reference import watch_latents
from support.tiny_flux2 import klein_reference, tiny_images

MOST_LEVELS = 1  # of 255, between our image and diffusers'
LEAST_LEVELS = 5  # by which an input that counts moves an image
MOST_LATENTS = 1e-3  # of their std, or of 1 where that is less: guidance makes a random model's latents large
Size = tuple[int, int]  # width and height


@dataclass(frozen=True)
class KleinRow:
    """A row as a user gives it. images: the query, then the contexts."""

    images: tuple[Image.Image, ...]
    prompt: str | None = "a misty forest"
    settings: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None

    def but(self, **settings: Any) -> KleinRow:
        """Return the same row with other settings."""
        return replace(self, settings=self.settings | settings)


def klein_row(
    seed: int, sizes: list[Size], prompt: str | None = "a misty forest", **settings: Any
) -> KleinRow:
    """Draw the query and the contexts of a row in these sizes, other ones for each seed."""
    settings = {"seed": seed, "num_inference_steps": 3} | settings
    return KleinRow(tuple(tiny_images(len(sizes), sizes, seed)), prompt, settings)


def request_of(model: ContextDiffusion, row: KleinRow, row_id: str = "row") -> Request:
    """Return the request of a row as the Python API makes it."""
    query, *contexts = row.images
    [request] = model.requests(
        query, contexts, row.prompt, row.negative_prompt, None, "crop", dict(row.settings)
    )
    return replace(request, id=row_id)


def outcomes_of(
    model: ContextDiffusion, rows: list[KleinRow], chunk: int | None = None
) -> list[Result | Failure]:
    """Generate rows in one engine, in chunks of `chunk` lanes."""
    requests = [request_of(model, row, str(number)) for number, row in enumerate(rows)]
    outcomes = {request.id: outcome for request, outcome in model.generate(requests, chunk=chunk)}
    return [outcomes[str(number)] for number in range(len(rows))]


def results_of(model: ContextDiffusion, rows: list[KleinRow], chunk: int | None = None) -> list[Result]:
    """Generate rows that all succeed."""
    outcomes = outcomes_of(model, rows, chunk)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert not failures
    return [outcome for outcome in outcomes if isinstance(outcome, Result)]


def by_diffusers(pipe: Flux2KleinPipeline, row: KleinRow, told: str) -> tuple[Pixels, torch.Tensor]:
    """Generate a row by diffusers alone. told: what the model reads in place of the prompt."""
    settings = row.settings
    return klein_reference(
        pipe,
        list(row.images),
        told,
        seed=settings["seed"],
        steps=settings["num_inference_steps"],
        guidance=settings.get("guidance_scale", 1.0 if pipe.config.is_distilled else 4.0),
        width=settings.get("width"),
        height=settings.get("height"),
    )


def levels_apart(image: Pixels, other: Pixels) -> int:
    """Return the largest difference of two images, of 255; 255 if their sizes differ."""
    if image.shape != other.shape:
        return 255
    return int(np.abs(image.astype(int) - other.astype(int)).max())


def assert_rows_equal_diffusers(
    model: ContextDiffusion, pipe: Flux2KleinPipeline, rows: list[KleinRow], chunk: int | None = None
) -> list[Result]:
    """Generate rows in one engine, compare each with diffusers alone, and return them."""
    with watch_latents(model.backbone) as latents:
        results = results_of(model, rows, chunk)
    for number, (row, result) in enumerate(zip(rows, results, strict=True)):
        assert result.full_prompt is not None
        pixels, theirs = by_diffusers(pipe, row, result.full_prompt)
        apart = float((latents[str(number)] - theirs).abs().max() / theirs.std().clamp(min=1))
        assert apart <= MOST_LATENTS, f"row {number}: latents differ by {apart:.2g} of their std"
        levels = levels_apart(result.image, pixels)
        assert levels <= MOST_LEVELS, f"row {number}: images differ by {levels} levels"
        assert len(np.unique(result.image)) > 30, "the image shows something"
    return results
