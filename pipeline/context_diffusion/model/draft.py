"""A draft: the query's tones in the contexts' colours, dark for dark and light for light. The U-Net begins from it.

This is dynamic normalisation carried on: of the query its own statistics are removed, and the contexts' put in their place,
as whole curves in place of mean and deviation. In two ways, since neither is always right: by rank (histogram matching,
Gonzalez and Woods) and by distance from the mean in deviations (Reinhard et al. 2001).

Every function treats its pictures one by one. B rows  N pictures  H W pixels
"""

from __future__ import annotations

import torch
from torch import Tensor

from context_diffusion.model.normalization import LEVEL, LUMA

WAYS, STEPS = 2, 64  # by rank and by deviations; steps of a curve
CHANNELS = 3 * WAYS
REACH = 2.5  # deviations from the mean that a curve covers
FALL = 0.7  # steps: how fast a colour's say falls off; where a context has none, the next one speaks


def _lightness(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> int (N, H·W), 0 to 255."""
    return (images.float() * images.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(1).round().long().flatten(1)


def tones_of(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W), its lightness counts -> (N, WAYS, H, W) in [0, 1]: each pixel's rank among all, equal ones in
    the middle of theirs, and its distance from the mean."""
    lightness = _lightness(images)
    counts = torch.zeros(len(images), 256, device=images.device).scatter_add_(1, lightness, torch.ones_like(lightness).float())
    rank = ((counts.cumsum(1) - counts / 2) / lightness.shape[1]).gather(1, lightness)
    light = lightness.float() / 255
    deviation = torch.std(light, 1, correction=0, keepdim=True).clamp(min=LEVEL)
    distance = ((light - light.mean(1, keepdim=True)) / deviation).clamp(-REACH, REACH)
    return torch.stack([rank, distance / (2 * REACH) + 0.5], 1).unflatten(2, images.shape[2:])


def colours_of(images: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> (N, WAYS, STEPS, 4): at each step of tone the sum of the colours in [0, 1] and their number,
    as shares of the picture."""
    tones = tones_of(images).flatten(2)
    steps = (tones * STEPS).long().clamp(max=STEPS - 1)
    pixels = torch.cat([images.float() / 255, torch.ones_like(images[:, :1]).float()], 1).flatten(2) / tones.shape[2]
    sums = torch.zeros(len(images), WAYS, 4, STEPS, device=images.device)
    for way in range(WAYS):
        sums[:, way].scatter_add_(2, steps[:, way, None].expand(-1, 4, -1), pixels)
    return sums.transpose(2, 3)


def draft(tones: Tensor, colours: Tensor) -> Tensor:
    """tones (B, WAYS, H, W), colours (B, WAYS, STEPS, 4), of several contexts summed by weight -> (B, CHANNELS, H, W) in
    [-1, 1]; 0 for a row without contexts."""
    places = torch.arange(STEPS, device=tones.device, dtype=torch.float32)
    near = torch.exp(-(places[:, None] - places).abs() / FALL)
    sums = torch.einsum("ij,bwjc->bwic", near, colours.float())
    curves = sums[..., :3] / sums[..., 3:].clamp(min=1e-30)
    curves = torch.where(colours.flatten(1).any(1)[:, None, None, None], 2 * curves - 1, 0.0)
    at = (tones.float() * STEPS - 0.5).clamp(0, STEPS - 1).flatten(2)
    low = at.floor().clamp(max=STEPS - 2)
    share, low = (at - low)[..., None], low.long()[..., None].expand(-1, -1, -1, 3)
    mixed = curves.gather(2, low) * (1 - share) + curves.gather(2, low + 1) * share
    return mixed.transpose(2, 3).reshape(len(tones), CHANNELS, *tones.shape[2:])
