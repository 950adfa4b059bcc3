"""A batch of the diffusion stage, from generated pools or a user's images.

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

# float16, (M, ...) each: a frozen context encoder's summaries of images, for fusion.encode
Summaries = tuple[Tensor, ...]


@dataclass(frozen=True)
class Hints:
    """The targets of the auxiliary heads for the first m contexts of a batch."""

    palettes: Tensor  # (m, 24), about unit std
    textures: Tensor  # (m,)


@dataclass(frozen=True)
class Samples:
    latents: Tensor  # float16 (B, C, h, w), of the targets
    # uint8 (M, 3, H, W), the first sample's first; or a frozen encoder's summaries
    contexts: Tensor | Summaries
    counts: NDArray[np.int64]  # (B,) contexts of each sample, 0 to CONTEXTS
    controls: Tensor  # float16 (B, C, h, w), of the control maps
    prompts: list[str]
    drafts: Tensor  # (B, CHANNELS, H, W): models/native/draft.py
    hints: Hints | None = None


class BatchSource(Protocol):
    """A source of batches."""

    def samples(
        self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]
    ) -> Samples:
        """Draw a batch of `size` samples by rng alone; return the samples numbered by `rows`."""


class Data(Protocol):
    """The training data of train_diffusion."""

    @property
    def origin(self) -> dict[str, str]:
        """Digests, by name, of what a checkpoint began with: only a run on the same can resume it."""

    def at(self, step: int) -> BatchSource: ...

    def validations(self) -> dict[str, BatchSource]:
        """Return held-out data by their names in the metrics; the first is the summary's."""

    def examples(self, count: int) -> tuple[list[Request], list[Pixels]]:
        """Return rows for the image of samples, and the target of each."""


def cropped(samples: Samples, rows: NDArray[np.int64], size: int, generator: torch.Generator) -> Samples:
    """Crop a quarter of each sample's latents, control map and draft, at the same place.

    Convolutions learn the same as from the whole, at a quarter of the cost; light across a whole image is
    learned at the end, without crops."""
    side = samples.latents.shape[-1] // 2
    places = torch.randint(0, side + 1, (size, 2), generator=generator)[rows].tolist()

    def cut(fields: Tensor) -> Tensor:
        f = fields.shape[-1] // (2 * side)  # pixels of these fields per latent
        parts = zip(fields, places, strict=True)
        return torch.stack(
            [field[:, f * y : f * (y + side), f * x : f * (x + side)] for field, (y, x) in parts]
        )

    return replace(
        samples, latents=cut(samples.latents), controls=cut(samples.controls), drafts=cut(samples.drafts)
    )
