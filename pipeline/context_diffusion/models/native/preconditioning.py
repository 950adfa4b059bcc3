"""Preconditioning of the U-Net by a draft: it denoises the difference between the image and its draft.

B samples  C channels of a latent  f x f pixels in each of its places h w
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REST = 0.13  # variance of an image's latents minus its draft's; the latents' own is about 1 (held-out rows)


class EncodedDraft(NamedTuple):
    """Drafts (models/native/draft.py) as the U-Net takes them."""

    pixels: Tensor  # (B, CHANNELS·f², h, w), those in each place; 0 where there is none
    latents: Tensor  # (B, C, h, w)


def precondition(
    latents: Tensor, draft: EncodedDraft, a: Tensor, s: Tensor, rest_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the U-Net's input, and the gain and the offset that turn its output into v = gain · output +
    offset.

    With x = a·z + s·noise and z = draft + rest, the input is a·rest + s·noise at unit std, followed by the
    draft's latents and pixels. The output, scaled by `rest_scale`, is added to the best guess that knows the
    rest's variance alone (preconditioning after Karras et al. 2022, for v). Without a draft, x is the input
    and the output is v."""
    seen = draft.latents.to(latents.dtype)
    has_draft = seen.flatten(1).any(1)[:, None, None, None]
    variance = torch.where(has_draft, REST, 1.0)
    # Exactly 1 without a draft, so that such a row has the same bits among rows that have one.
    total = torch.where(has_draft, a * a * variance + s * s, 1.0)
    noisy = latents - a * seen
    guess = a * s * (1 - variance) / total * noisy - s * seen
    given = torch.cat([(noisy / total.sqrt()).to(latents.dtype), seen, draft.pixels.to(latents.dtype)], 1)
    gain = (variance / total).sqrt() * torch.where(variance < 1, rest_scale, 1.0)
    return given, gain.to(latents.dtype), guess.to(latents.dtype)


def levels(alphas: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and s, (B, 1, 1, 1), of timesteps (B,), interpolated between whole ones. alphas: (T,),
    cumulative."""
    table = alphas.to(timesteps.device)
    times = timesteps.float().clamp(0, len(table) - 1)
    low = times.floor().long()
    alpha = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], times.frac())[
        :, None, None, None
    ]
    return alpha.sqrt(), (1 - alpha).sqrt()
