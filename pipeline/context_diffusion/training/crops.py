"""Quarters of a batch's pictures: four times as many steps in the same time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from context_diffusion.training.batches import Samples


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
