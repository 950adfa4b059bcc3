"""What a step of the diffusion stage takes, whoever made it: the generator's pools or one's own pictures.

Several workers draw the same batch; each takes its own rows of it.

B samples  M contexts of all samples together  C h w latents  H W pixels
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from context_diffusion.core.records import Pixels, Request
from context_diffusion.core.settings import Settings
from context_diffusion.training.data.layouts import Rng

CONTEXTS = 3  # that a sample may have

SAMPLE_SETTINGS = Settings(num_inference_steps=12, guidance_scale=1.5)

Summaries = tuple[Tensor, ...]  # float16, (M, ...) each: what a frozen context encoder says of pictures, for fusion.encode


@dataclass(frozen=True)
class Hints:
    """What the auxiliary heads should say of the first m contexts of a batch."""

    palettes: Tensor  # (m, 24), about unit deviation
    textures: Tensor  # (m,)


@dataclass(frozen=True)
class Samples:
    latents: Tensor  # float16 (B, C, h, w), of the targets
    contexts: Tensor | Summaries  # uint8 (M, 3, H, W), the first sample's first; a frozen encoder saw them before
    counts: NDArray[np.int64]  # (B,) how many each sample shows, 0 to CONTEXTS
    controls: Tensor  # float16 (B, C, h, w), of the control maps
    prompts: list[str]
    drafts: Tensor  # (B, CHANNELS, H, W): models/native/draft.py
    hints: Hints | None = None


class BatchSource(Protocol):
    """Something that batches are drawn from."""

    def samples(self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]) -> Samples:
        """Draws a batch of `size` samples by rng alone; -> those that `rows` numbers."""


class Data(Protocol):
    """What train_diffusion learns from."""

    @property
    def origin(self) -> dict[str, str]:
        """Name -> digest of what a checkpoint began with: a run on something else cannot go on from it."""

    def at(self, step: int) -> BatchSource: ...

    def validations(self) -> dict[str, BatchSource]:
        """What is never trained on, by its name in the metrics; the first one is the summary's."""

    def examples(self, count: int) -> tuple[list[Request], list[Pixels]]:
        """Rows for the picture of samples, and what each should become."""


def cropped(samples: Samples, rows: NDArray[np.int64], size: int, generator: torch.Generator) -> Samples:
    """A quarter of each latent picture and of its control map, at the same place. Convolutions learn from it what they
    learn from the whole, at a quarter of the cost; light that falls over the picture they learn at the end."""
    side = samples.latents.shape[-1] // 2
    places = torch.randint(0, side + 1, (size, 2), generator=generator)[rows].tolist()

    def cut(pictures: Tensor) -> Tensor:
        f = pictures.shape[-1] // (2 * side)  # of these pictures' points a side of a latent
        parts = zip(pictures, places, strict=True)
        return torch.stack([one[:, f * y : f * (y + side), f * x : f * (x + side)] for one, (y, x) in parts])

    return replace(samples, latents=cut(samples.latents), controls=cut(samples.controls), drafts=cut(samples.drafts))
