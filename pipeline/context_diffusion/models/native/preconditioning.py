"""What the U-Net is given where there is a draft, and what is made of its answer: it denoises what the draft lacks.

B samples  C channels of a latent  f x f pixels in each of its places h w
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REST = 0.13  # variance of what a draft lacks of its picture's latents, which have about 1 (held-out rows)


class EncodedDraft(NamedTuple):
    """Drafts (models/native/draft.py) as the U-Net takes them."""

    pixels: Tensor  # (B, CHANNELS·f², h, w), those in each place; 0 where there is none
    latents: Tensor  # (B, C, h, w)


def precondition(latents: Tensor, draft: EncodedDraft, a: Tensor, s: Tensor, rest_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> what the U-Net takes, and what its output is to be multiplied with and what added, to be v.

    Of x = a·z + s·noise with z = draft + rest it is given a·rest + s·noise, at unit deviation, and what it says is added,
    by `rest_scale`, to the best guess that knows the rest's variance alone (preconditioning after Karras et al. 2022, for
    v): it begins from the draft, and without one as if none were. Beside it stand the draft's latents and pixels."""
    seen = draft.latents.to(latents.dtype)
    told = seen.flatten(1).any(1)[:, None, None, None]
    variance = torch.where(told, REST, 1.0)
    # 1 to the bit without a draft: a row among others that have one is then what it is alone.
    total = torch.where(told, a * a * variance + s * s, 1.0)
    noisy = latents - a * seen
    guess = a * s * (1 - variance) / total * noisy - s * seen
    given = torch.cat([(noisy / total.sqrt()).to(latents.dtype), seen, draft.pixels.to(latents.dtype)], 1)
    gain = (variance / total).sqrt() * torch.where(variance < 1, rest_scale, 1.0)
    return given, gain.to(latents.dtype), guess.to(latents.dtype)


def levels(alphas: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alphas: (T,), cumulative. timesteps: (B,), between two where a sampler asks for it. -> a and s, (B, 1, 1, 1)."""
    table = alphas.to(timesteps.device)
    times = timesteps.float().clamp(0, len(table) - 1)
    low = times.floor().long()
    found = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], times.frac())[:, None, None, None]
    return found.sqrt(), (1 - found).sqrt()
