"""The finished image from the draft and what the diffusion model changed of it, so that nothing of the draft
is lost in the autoencoder; and images without a camera's noise.

Every function treats its images one by one. B images  H W pixels
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

REACH, PATCH = 3, 3  # pixels: how far away what is alike is looked for, and by patches of what size
FAINT = 1e-3  # noise of less than a quarter of a step of 255 is none


def give_back(
    images: Tensor, drafts: Tensor, copies: Tensor, share: Tensor | float, rest_scale: Tensor | float
) -> Tensor:
    """Return drafts + rest_scale · (images - copies), mixed with images where `share` is below 1; (B, 3, H,
    W) in [0, 1].

    images: decoded. copies: what the autoencoder makes of the drafts. What it loses of both is the same, and
    cancels."""
    return (images + share * (drafts + rest_scale * (images - copies) - images)).clamp(0, 1)


def denoised(images: Tensor) -> Tensor:
    """(B, 3, H, W) without a camera's noise, which is no layout: each pixel the mean of those with patches
    like its own (non-local means, Buades et al. 2005), as like as the picture's noise lets them be."""
    variance = noise_of(images)[:, None, None, None].square()
    padded = F.pad(images, (REACH,) * 4, mode="reflect")
    (height, width), total, weights = (
        images.shape[2:],
        torch.zeros_like(images),
        torch.zeros_like(images[:, :1]),
    )
    for y in range(2 * REACH + 1):
        for x in range(2 * REACH + 1):
            other = padded[:, :, y : y + height, x : x + width]
            unlike = (images - other).square().mean(1, keepdim=True)
            unlike = F.avg_pool2d(unlike, PATCH, 1, PATCH // 2, count_include_pad=False)
            weight = torch.exp(
                -(unlike - 2 * variance).clamp(min=0) / variance
            )  # equal patches differ by two noises
            total, weights = total + weight * other, weights + weight
    return total / weights


def noise_of(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B,): the deviation of what no plane explains (Immerkaer 1996), by its median: borders
    are few."""
    curve = images.new_tensor([1.0, -2.0, 1.0])
    found = F.conv2d(images, (curve[:, None] * curve / 6).expand(3, 1, 3, 3), groups=3)
    return (1.4826 * found.abs().flatten(1).median(1).values).clamp(min=FAINT)
