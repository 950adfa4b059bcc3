"""A draft: the query's tones in the contexts' colours and under their texture, dark for dark and light for
light. The U-Net begins from it.

This is dynamic normalisation carried on: of the query its own statistics are removed, and the contexts' put
in their place, as whole curves in place of mean and deviation. In two ways, since neither is always right: by
rank (histogram matching, Gonzalez and Woods) and by distance from the mean in deviations (Reinhard et al.
2001). The contexts' waves (models/native/plane_waves.py) are added to the tones, and of their relief
(models/native/texture_separation.py) what doesn't repeat. The query's own relief stays, for its edges are
asked for, but where the contexts have none or words ask for another: there it would be the only one, or stand
beside theirs. Its waves are shown beside the contexts', for they may be its layout or a texture that is to
go.

Every function treats its pictures one by one. B rows  M contexts of a row  N pictures  H W pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.models.native.plane_waves import draw_waves, waves_of
from context_diffusion.models.normalization import LEVEL, lightness_of

WAYS, STEPS = 2, 64  # by rank and by deviations; steps of a curve
CHANNELS = 3 * WAYS + 3 + 2  # plain in both ways, textured, the contexts' waves and the query's
TEXTURED = slice(3 * WAYS, 3 * WAYS + 3)
REACH = 2.5  # deviations from the mean that a curve covers
FALL = 0.7  # steps: how fast a colour's say falls off; where a context has none, the next one speaks
PICTURE_KINDS = ("gray", "none")  # control maps that show tones; those of edges do not
VIVID = 1.15  # times as strong as it is told is a context's texture drawn: what is unsure is told too faintly
LOUD = 4.0  # waves are some .1 to .25 of all tones
# Deviation, in ranks, of the contexts' texture: up to it they have none, and from twice it on the query keeps
# its own.
PLAIN = 0.02
# What a difference of ranks is in deviations, of evenly spread tones.
RATE = (1.0, math.sqrt(12) / (2 * REACH))


class Layout(NamedTuple):
    """Of queries, what drafts need of them. tones: (N, WAYS, H, W), 0 where the control map is no picture."""

    tones: Tensor
    waves: Tensor  # (N, K, 4)
    texture: Tensor  # (N, H, W), in ranks


class Look(NamedTuple):
    """Of contexts. colours: (N, WAYS, STEPS, 4), at each step of tone the sum of the colours in [0, 1] and
    their number, as shares of the picture."""

    colours: Tensor
    waves: Tensor  # (N, K, 4)
    rest: Tensor  # (N, S, S), of their texture, in ranks; mirrored where a picture is larger


def shows_tones(kinds: list[str], device: torch.device) -> Tensor:
    """(N,) bool."""
    return torch.tensor([kind in PICTURE_KINDS for kind in kinds], device=device)


def layout_of(control_maps: Tensor, kinds: list[str], texture_of: Callable[[Tensor], Tensor] | None = None) -> Layout:
    """uint8 (N, 3, H, W); texture_of: ReliefModel.texture, without which none is told."""
    tones = tones_of(control_maps)
    waves, told = waves_of(tones[:, 0]), shows_tones(kinds, tones.device)
    texture = torch.zeros_like(tones[:, 0]) if texture_of is None else texture_of(tones)
    return Layout(tones * told[:, None, None, None], waves * told[:, None, None], texture * told[:, None, None])


def look_of(images: Tensor, side: int, texture_of: Callable[[Tensor], Tensor] | None = None) -> Look:
    """uint8 (N, 3, S, S); side: pixels of the pictures that are made, in which textures are measured;
    texture_of: ReliefModel.texture. Without it waves are looked for in the tones, where a layout hides some,
    and there is no rest."""
    tones = tones_of(images)
    small = F.adaptive_avg_pool2d(tones, side)
    texture = small[:, 0] if texture_of is None else VIVID * texture_of(small)
    waves = waves_of(texture)
    rest = torch.zeros_like(texture) if texture_of is None else texture - draw_waves(waves, side, side)
    return Look(colours_of(images, tones), waves, rest)


def _lightness(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> int (N, H·W), 0 to 255."""
    return lightness_of(images.float()).round().long().flatten(1)


def tones_of(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W), its lightness counts -> (N, WAYS, H, W) in [0, 1]: each pixel's rank among all,
    equal ones in the middle of theirs, and its distance from the mean."""
    lightness = _lightness(images)
    counts = torch.zeros(len(images), 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, lightness, torch.ones_like(lightness))
    rank = ((counts.cumsum(1) - counts / 2) / lightness.shape[1]).gather(1, lightness)
    light = lightness.float() / 255
    deviation = torch.std(light, 1, correction=0, keepdim=True).clamp(min=LEVEL)
    distance = ((light - light.mean(1, keepdim=True)) / deviation).clamp(-REACH, REACH)
    return torch.stack([rank, distance / (2 * REACH) + 0.5], 1).unflatten(2, images.shape[2:])


def colours_of(images: Tensor, tones: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) and its tones -> Look.colours."""
    tones = tones.flatten(2)
    steps = (tones * STEPS).long().clamp(max=STEPS - 1)
    # Whole numbers: a GPU adds them up in any order, and fractions would be other bits each time.
    pixels = torch.cat([images, torch.full_like(images[:, :1], 255)], 1).flatten(2).long()
    sums = torch.zeros(len(images), WAYS, 4, STEPS, dtype=torch.long, device=images.device)
    for way in range(WAYS):
        sums[:, way].scatter_add_(2, steps[:, way, None].expand(-1, 4, -1), pixels)
    return (sums.transpose(2, 3).double() / (255 * tones.shape[2])).float()


def draft(layouts: Layout, looks: Look, weights: Tensor, relief: Tensor | None = None) -> Tensor:
    """layouts: of B; looks: (B, M, ...) each part, with the weights (B, M) >= 0; relief: (B, H, W), a texture
    in ranks that words ask for, where the looks have none -> (B, CHANNELS, H, W), about -1 to 1; 0 for a row
    without contexts or tones."""
    tones, (height, width) = layouts.tones.float(), layouts.tones.shape[2:]
    rate = tones.new_tensor(RATE)[:, None, None]
    curves = curves_of((looks.colours.float() * weights[..., None, None, None]).sum(1))
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
    waves = looks.waves.float() * torch.stack([torch.ones_like(shares)] * 2 + [shares] * 2, 2)[:, :, None]
    theirs, own = draw_waves(waves.flatten(1, 2), height, width)[:, None], draw_waves(layouts.waves, height, width)[:, None]
    theirs = theirs + mirrored(_rest(looks.rest.float(), shares), height, width)[:, None]
    goes = plainness(theirs)
    theirs = theirs if relief is None else theirs + relief[:, None]
    theirs = theirs - theirs.mean((2, 3), keepdim=True)  # a curve of colours has its texture's mean in it
    tones = (tones - goes * layouts.texture.float()[:, None] * rate).clamp(0, 1)
    textured = (tones + theirs * rate).clamp(0, 1)
    parts = [*_dressed(tones, curves), torch.stack(_dressed(textured, curves)).mean(0), LOUD * theirs, LOUD * own]
    told = (weights > 0).any(1) & tones.flatten(1).any(1)
    return torch.cat(parts, 1) * told[:, None, None, None]


def plainness(textures: Tensor) -> Tensor:
    """(B, 1, H, W), in ranks -> (B, 1, 1, 1): 1 where there is hardly any, 0 where there surely is one."""
    return (2 - textures.std((2, 3), correction=0, keepdim=True) / PLAIN).clamp(0, 1)


def _rest(rests: Tensor, shares: Tensor) -> Tensor:
    """(B, M, S, S) of several contexts -> (B, S, S), as strong as one's: what lies elsewhere in each would
    cancel out."""
    mean = (rests * shares[..., None, None]).sum(1)
    wanted = (rests.square().mean((2, 3)) * shares).sum(1)
    return mean * (wanted / mean.square().mean((1, 2)).clamp(min=1e-12)).sqrt().clamp(max=2)[:, None, None]


def mirrored(fields: Tensor, height: int, width: int) -> Tensor:
    """(N, S, S) -> (N, H, W), mirrored where a picture is larger."""
    for dim, size in ((1, height), (2, width)):
        at = torch.arange(size, device=fields.device) % (2 * fields.shape[dim])
        fields = fields.index_select(dim, torch.where(at < fields.shape[dim], at, 2 * fields.shape[dim] - 1 - at))
    return fields


def curves_of(colours: Tensor) -> Tensor:
    """(B, WAYS, STEPS, 4) -> (B, WAYS, STEPS, 3) in [-1, 1]: the colour of each step of tone."""
    places = torch.arange(STEPS, device=colours.device, dtype=torch.float32)
    near = torch.exp(-(places[:, None] - places).abs() / FALL)
    sums = torch.einsum("ij,bwjc->bwic", near, colours)
    return 2 * sums[..., :3] / sums[..., 3:].clamp(min=1e-30) - 1


def _dressed(tones: Tensor, curves: Tensor) -> list[Tensor]:
    """(B, WAYS, H, W) -> by each way, (B, 3, H, W)."""
    at = (tones * STEPS - 0.5).clamp(0, STEPS - 1).flatten(2)
    low = at.floor().clamp(max=STEPS - 2)
    share, low = (at - low)[..., None], low.long()[..., None].expand(-1, -1, -1, 3)
    mixed = curves.gather(2, low) * (1 - share) + curves.gather(2, low + 1) * share
    return list(mixed.transpose(2, 3).unflatten(3, tones.shape[2:]).unbind(1))
