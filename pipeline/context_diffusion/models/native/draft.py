"""Drafts: the query's tones in the contexts' colours and texture. The U-Net starts from a draft.

A draft extends dynamic normalisation: the query's own statistics are replaced by the contexts', as whole
curves instead of mean and std. There are two, since neither is always right: by rank (histogram matching,
Gonzalez and Woods) and by distance from the mean in stds (Reinhard et al. 2001). The contexts' texture
(models/native/texture_separation.py) is added to the tones. The query's own texture stays, since its edges
are wanted, unless the contexts have none or words ask for another one. Training draws all of a draft here;
for a generated image TEXTURED is replaced by that of models/native/draft_image.py.

Every function treats its images one by one. B rows  M contexts of a row  N images  H W pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.models.normalization import LEVEL, lightness_of

WAYS, STEPS = 2, 64  # by rank and by stds; steps of a curve
CHANNELS = 3 * WAYS + 3  # plain in both ways, textured
TEXTURED = slice(3 * WAYS, 3 * WAYS + 3)
REACH = 2.5  # stds from the mean that a curve covers
FALL = 0.7  # steps: how fast a colour's weight falls off; a step without colours takes the nearest one
PICTURE_KINDS = ("gray", "none")  # control maps that show tones; those of edges do not
VIVID = 1.15  # factor of a context's separated texture: uncertain textures are estimated too faint
# Std, in ranks, of the contexts' texture: up to it they have none; from twice it on the query keeps its
# texture.
PLAIN = 0.02
# A difference of ranks in units of each way, for evenly spread tones.
RATE = (1.0, math.sqrt(12) / (2 * REACH))


class Layout(NamedTuple):
    """What drafts need of queries. tones: (N, WAYS, H, W), 0 for control maps that show no tones."""

    tones: Tensor
    texture: Tensor  # (N, H, W), in ranks


class Look(NamedTuple):
    """What drafts need of contexts. colours: (N, WAYS, STEPS, 4), at each step of tone the sum of the colours
    in [0, 1] and their number, as shares of the image."""

    colours: Tensor
    texture: Tensor  # (N, S, S), in ranks; mirrored for larger images


def shows_tones(kinds: list[str], device: torch.device) -> Tensor:
    """Return whether control maps of these kinds show tones, (N,) bool."""
    return torch.tensor([kind in PICTURE_KINDS for kind in kinds], device=device)


def layout_of(
    control_maps: Tensor,
    kinds: list[str],
    texture_of: Callable[[Tensor], Tensor] | None = None,
    side: int = 128,
) -> Layout:
    """Measure queries, uint8 (N, 3, H, W).

    texture_of: ReliefModel.texture; None: no texture is measured. side: pixels of the shorter side at which
    textures of larger queries are measured."""
    tones = tones_of(control_maps)
    has_tones = shows_tones(kinds, tones.device)
    texture = torch.zeros_like(tones[:, 0]) if texture_of is None else _at_side(tones, side, texture_of)
    return Layout(
        tones * has_tones[:, None, None, None],
        texture * has_tones[:, None, None],
    )


def _at_side(tones: Tensor, side: int, texture_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Measure the textures (N, H, W) of tones (N, WAYS, H, W), those of larger images at `side` pixels."""
    height, width = tones.shape[2:]
    factor = side / min(height, width)
    if factor >= 1:
        return texture_of(tones)
    small = F.interpolate(tones, (round(height * factor), round(width * factor)), mode="area")
    texture = texture_of(small)[:, None]
    return F.interpolate(texture, (height, width), mode="bilinear", align_corners=False)[:, 0]


def look_of(images: Tensor, side: int, texture_of: Callable[[Tensor], Tensor] | None = None) -> Look:
    """Measure contexts, uint8 (N, 3, S, S).

    side: pixels a side of generated images, at which textures are measured. texture_of: ReliefModel.texture;
    None: no texture is measured."""
    tones = tones_of(images)
    small = F.adaptive_avg_pool2d(tones, side)
    texture = torch.zeros_like(small[:, 0]) if texture_of is None else VIVID * texture_of(small)
    return Look(colours_of(images, tones), texture)


def _lightness(images: Tensor) -> Tensor:
    """Return the lightness of uint8 (N, 3, H, W), int (N, H·W) of 0 to 255."""
    return lightness_of(images.float()).round().long().flatten(1)


def tones_of(images: Tensor) -> Tensor:
    """Return the tones (N, WAYS, H, W) in [0, 1] of uint8 (N, 3, H, W): each pixel's rank in lightness, equal
    ones at the middle of their ranks, and its distance from the mean in stds."""
    lightness = _lightness(images)
    counts = torch.zeros(len(images), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, lightness, torch.ones_like(lightness))
    rank = ((counts.cumsum(1) - counts / 2) / lightness.shape[1]).gather(1, lightness)
    light = lightness.float() / 255
    std = torch.std(light, 1, correction=0, keepdim=True).clamp(min=LEVEL)
    distance = ((light - light.mean(1, keepdim=True)) / std).clamp(-REACH, REACH)
    return torch.stack([rank, distance / (2 * REACH) + 0.5], 1).unflatten(2, images.shape[2:])


def colours_of(images: Tensor, tones: Tensor) -> Tensor:
    """Measure Look.colours of uint8 (N, 3, S, S) and its tones."""
    tones = tones.flatten(2)
    steps = (tones * STEPS).long().clamp(max=STEPS - 1)
    # Integers: a GPU adds in any order, so the bits of sums of fractions would differ each time.
    pixels = torch.cat([images, torch.full_like(images[:, :1], 255)], 1).flatten(2).long()
    sums = torch.zeros(len(images), WAYS, 4, STEPS, dtype=torch.long, device=images.device)
    for way in range(WAYS):
        sums[:, way].scatter_add_(2, steps[:, way, None].expand(-1, 4, -1), pixels)
    return (sums.transpose(2, 3).double() / (255 * tones.shape[2])).float()


def draft(layouts: Layout, looks: Look, weights: Tensor) -> Tensor:
    """Return drafts (B, CHANNELS, H, W) in [-1, 1]; 0 for a row without contexts or tones.

    layouts: of B rows. looks: each part (B, M, ...), with weights (B, M) >= 0."""
    tones = layouts.tones.float()
    height, width = tones.shape[2:]
    rate = tones.new_tensor(RATE)[:, None, None]
    curves = curves_of((looks.colours.float() * weights[..., None, None, None]).sum(1))
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
    texture = mirrored(average_textures(looks.texture.float(), shares), height, width)[:, None]
    removed = plainness(texture) * layouts.texture.float()[:, None]
    texture = texture - texture.mean((2, 3), keepdim=True)  # the curve of colours contains the texture's mean
    tones = (tones - removed * rate).clamp(0, 1)
    textured = (tones + texture * rate).clamp(0, 1)
    parts = [*coloured(tones, curves), torch.stack(coloured(textured, curves)).mean(0)]
    has_draft = (weights > 0).any(1) & tones.flatten(1).any(1)
    return torch.cat(parts, 1) * has_draft[:, None, None, None]


def plainness(textures: Tensor) -> Tensor:
    """Return how plain textures (B, 1, H, W), in ranks, are, (B, 1, 1, 1): 1 for almost none, 0 for a clear
    one."""
    return (2 - textures.std((2, 3), correction=0, keepdim=True) / PLAIN).clamp(0, 1)


def average_textures(textures: Tensor, shares: Tensor) -> Tensor:
    """Average the textures (B, M, S, S) of several contexts to (B, S, S), scaled to the strength of one:
    averaging cancels them."""
    mean = (textures * shares[..., None, None]).sum(1)
    wanted = (textures.square().mean((2, 3)) * shares).sum(1)
    return mean * (wanted / mean.square().mean((1, 2)).clamp(min=1e-12)).sqrt().clamp(max=2)[:, None, None]


def mirrored(fields: Tensor, height: int, width: int) -> Tensor:
    """Extend (N, S, S) to (N, H, W) by mirroring."""
    for dim, size in ((1, height), (2, width)):
        at = torch.arange(size, device=fields.device) % (2 * fields.shape[dim])
        fields = fields.index_select(
            dim, torch.where(at < fields.shape[dim], at, 2 * fields.shape[dim] - 1 - at)
        )
    return fields


def curves_of(colours: Tensor) -> Tensor:
    """Turn Look.colours (B, WAYS, STEPS, 4) into curves (B, WAYS, STEPS, 3) in [-1, 1]: the colour of each
    step of tone."""
    places = torch.arange(STEPS, device=colours.device, dtype=torch.float32)
    near = torch.exp(-(places[:, None] - places).abs() / FALL)
    sums = torch.einsum("ij,bwjc->bwic", near, colours)
    return 2 * sums[..., :3] / sums[..., 3:].clamp(min=1e-30) - 1


def coloured(tones: Tensor, curves: Tensor) -> list[Tensor]:
    """Colour tones (B, WAYS, H, W) by the curves of each way, (B, 3, H, W) each."""
    at = (tones * STEPS - 0.5).clamp(0, STEPS - 1).flatten(2)
    low = at.floor().clamp(max=STEPS - 2)
    share, low = (at - low)[..., None], low.long()[..., None].expand(-1, -1, -1, 3)
    mixed = curves.gather(2, low) * (1 - share) + curves.gather(2, low + 1) * share
    return list(mixed.transpose(2, 3).unflatten(3, tones.shape[2:]).unbind(1))
