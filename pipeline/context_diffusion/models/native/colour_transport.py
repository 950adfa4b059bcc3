"""Colours of contexts on the pixels of a query, by optimal transport in Lab, smoothed so that the query's
layout stays.

The transport is sliced: along each of a fixed set of axes the query's values are replaced by the contexts' of
the same rank (Pitié et al. 2005; Rabin et al. 2011). What it moves is smoothed by a guided filter whose guide
is the query's lightness (He et al. 2013), computed at a small size (He and Sun 2015). Nothing is drawn by
chance, and every value is found by sorting or by sums over a fixed window, so that a row has equal bits in
any batch.

Hues that change within a few pixels, as brush strokes do, are texture: a query takes the coarse colours, in
which such hues are averaged, gets the fine ones with the texture (models/native/draft_image.py), and the
chroma of both together is brought to that of the contexts at last.

N images  H W pixels  n samples  S side of a context
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 96  # pixels a side at which colours are transported
SAMPLES = 4096  # pixels of the contexts
AXES = 10  # rotations of the three axes of Lab
STRETCH = (0.01, 0.99)  # quantiles of the query's lightness that become 0 and 100
PLACE = (0.6, 3.0, 3.0)  # Lab units over the image: what pixels of equal colour are ordered by
PLACE_LAST = 0.1  # factor of PLACE in the last transport, where the texture orders most pixels
RADII, EPSILONS = (5, 2), (40.0, 15.0)  # of the two passes of the guided filter; squared units of lightness
MIN_RISE = 0.2  # of lightness with the query's: less makes a query of few tones vanish
MAX_LIFT = 15.0  # lightness by which an image is lifted where that needs room
HUES = 60.0  # squared chroma within a tone from which a context has several hues per tone
GRAIN = 0.04  # std, in sides of a context, of the blur that coarse chroma is of
TONES, TONE = 32, 8.0  # groups of equally light pixels; lightness within which they share one mean chroma
DENSE = 3.0  # typical fine chroma that counts half
MATCHED = 0.7  # share of the way to the contexts' chroma that the last transport goes
RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
XYZ_TO_RGB = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
WHITE = (0.95047, 1.0, 1.08883)  # D65


def lab_of(images: Tensor) -> Tensor:
    """Convert sRGB (N, 3, H, W) in [0, 1] to CIE Lab."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).clamp(min=0) ** 2.4, images / 12.92)
    xyz = _mixed(linear, RGB_TO_XYZ) / images.new_tensor(WHITE)[:, None, None]
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def rgb_of(lab: Tensor) -> Tensor:
    """Convert CIE Lab (N, 3, H, W) to sRGB in [0, 1]; colours outside are clamped."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    roots = torch.stack([y + a / 500, y, y - b / 200], 1)
    xyz = torch.where(roots > 0.206897, roots**3, (roots - 16 / 116) / 7.787)
    linear = _mixed(xyz * lab.new_tensor(WHITE)[:, None, None], XYZ_TO_RGB).clamp(0, 1)
    return torch.where(
        linear > 0.0031308, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear
    )


def _mixed(values: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    return torch.stack([sum(share * values[:, k] for k, share in enumerate(row)) for row in matrix], 1)  # type: ignore[misc]


class Palette(NamedTuple):
    """Colours of contexts, Lab (n, 3) each: all, and the coarse ones."""

    colours: Tensor
    coarse: Tensor


def palette_of(context: Tensor) -> Palette:
    """Return SAMPLES colours of a context, uint8 (1, 3, S, S)."""
    side = math.isqrt(SAMPLES)
    small = F.interpolate(
        context.float() / 255, (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    lab = lab_of(small)
    coarse = torch.cat([lab[:, :1], lab[:, 1:] - fine_chroma(lab)], 1)
    return Palette(*(part.flatten(2)[0].T.contiguous() for part in (lab, coarse)))


def mixed_palettes(palettes: list[Palette], weights: list[float]) -> Palette:
    """Take from each palette of SAMPLES colours the share of its weight, evenly over the image. Returns about
    SAMPLES colours."""
    total = sum(weights)
    parts = []
    for palette, weight in zip(palettes, weights, strict=True):
        count = round(SAMPLES * weight / total)
        chosen = (torch.arange(count, device=palette.colours.device).double() + 0.5) * (
            SAMPLES / max(count, 1)
        )
        parts.append(Palette(*(colours[chosen.long()] for colours in palette)))
    return Palette(*(torch.cat(colours) for colours in zip(*parts, strict=True)))


def fine_chroma(lab: Tensor) -> Tensor:
    """Return how the chroma of Lab (N, 3, S, S) differs, within a few pixels, from that of equally light
    pixels; (N, 2, S, S). Fainter where only a few pixels differ: these are objects, not texture."""
    difference = lab[:, 1:] - _mean_chroma(lab)
    coarse = blurred(difference.flatten(0, 1)[:, None], GRAIN * min(lab.shape[2:]))
    fine = difference - coarse[:, 0].unflatten(0, (len(lab), 2))
    typical = fine.square().sum(1).flatten(1).median(1).values[:, None, None, None]
    return fine * (typical / (typical + DENSE**2))


def _mean_chroma(lab: Tensor) -> Tensor:
    """Return the mean chroma of the pixels that are about as light as each, (N, 2, S, S)."""
    values = lab.flatten(2)
    order = values[:, :1].argsort(dim=2, stable=True)
    groups = F.adaptive_avg_pool1d(values.gather(2, order.expand(-1, 3, -1)), TONES)
    near = torch.exp(-(groups[:, :1, None] - groups[:, :1, :, None]).square() / (2 * TONE**2))
    means = (near * groups[:, 1:, None]).sum(3) / near.sum(3)
    count = values.shape[2]
    ranked = means[:, :, torch.arange(count, device=lab.device) * TONES // count]
    return torch.zeros_like(ranked).scatter(2, order.expand(-1, 2, -1), ranked).unflatten(2, lab.shape[2:])


def hues_per_tone(palette: Tensor) -> float:
    """Return how far a palette (n, 3) has several hues of one lightness: 0 for one hue, towards 1 for
    many."""
    chroma = palette[palette[:, 0].argsort(dim=0, stable=True), 1:]
    groups = chroma[: len(chroma) // 32 * 32].unflatten(0, (32, -1))
    variance = float((groups - groups.mean(1, keepdim=True)).square().sum(2).mean())
    return variance / (variance + HUES)


def stretched(lab: Tensor) -> Tensor:
    """Stretch the lightness of (1, 3, H, W) to 0 to 100; chroma stays."""
    lightness = lab[:, :1]
    many = lightness.numel() > 4 * SIDE**2
    values = (F.adaptive_avg_pool2d(lightness, 2 * SIDE) if many else lightness).flatten().sort().values
    low, high = (values[int(share * (len(values) - 1))] for share in STRETCH)
    light = ((lightness - low) / (high - low).clamp(min=1) * 100).clamp(0, 100)
    return torch.cat([light, lab[:, 1:]], 1)


def transported(query: Tensor, palette: Tensor) -> Tensor:
    """Give a query, stretched Lab (1, 3, H, W), the colours of a palette (n, 3). Returns Lab (1, 3, H, W).

    Two passes: the first from the query's colours, the second from what smoothing left of the first."""
    height, width = query.shape[2:]
    small = _reduced(query)
    guide, full_guide = small[:, :1], query[:, :1]
    result, small_result = query, small
    for radius, epsilon in zip(RADII, EPSILONS, strict=True):
        points = (small_result + _places(small)).flatten(2)[0].T
        moved = _transport(points, palette).T.reshape(small.shape) - small_result
        slope, offset = guided_coefficients(guide, moved, radius, epsilon)
        small_result = small_result + slope * guide + offset
        slope, offset = (
            F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
            for part in (slope, offset)
        )
        result = result + slope * full_guide + offset
    return result


def matched_chroma(lab: Tensor, colours: Tensor) -> Tensor:
    """Bring the chroma of Lab (1, 3, H, W) towards the distribution of colours (n, 3); its lightness
    stays, so that a pixel gets little of the chroma of a colour of other lightness."""
    small = _reduced(lab)
    points = (small + PLACE_LAST * _places(small)).flatten(2)[0].T
    moved = _transport(points, colours).T.reshape(small.shape) - small
    moved = _box(moved[:, 1:] * torch.exp(-moved[:, :1].square() / (2 * TONE**2)), 1)
    moved = F.interpolate(moved, lab.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([lab[:, :1], lab[:, 1:] + MATCHED * moved], 1)


def _reduced(images: Tensor) -> Tensor:
    """Return (1, C, H, W) with SIDE pixels on the shorter side, smaller images as they are."""
    factor = SIDE / min(images.shape[2:])
    if factor >= 1:
        return images
    size = [max(round(side * factor), 1) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _places(images: Tensor) -> Tensor:
    """Return what orders pixels of equal colour: their place, as an offset in Lab (1, 3, H, W)."""
    height, width = images.shape[2:]
    down = (torch.arange(height, device=images.device) / max(height - 1, 1) - 0.5)[:, None].expand(
        height, width
    )
    across = (torch.arange(width, device=images.device) / max(width - 1, 1) - 0.5)[None].expand(height, width)
    return torch.stack([-PLACE[0] * down, PLACE[1] * across, PLACE[2] * down])[None]


def _transport(points: Tensor, palette: Tensor) -> Tensor:
    """Move points (n, 3) to the distribution of a palette (m, 3), one rotation of the axes after the
    other."""
    places = (
        (torch.arange(len(points), device=points.device).double() + 0.5) * (len(palette) / len(points))
    ).long()
    for rotation in _rotations():
        axes = points.new_tensor(rotation)
        wanted = _along(palette, axes).sort(0).values[places]
        order = _along(points, axes).argsort(dim=0, stable=True)
        points = _along(torch.zeros_like(points).scatter(0, order, wanted), axes.T)
    return points


def _along(points: Tensor, axes: Tensor) -> Tensor:
    return points[:, :1] * axes[0] + points[:, 1:2] * axes[1] + points[:, 2:] * axes[2]


def _rotations() -> list[list[list[float]]]:
    """Return AXES rotations that cover the directions evenly: the first and the last are Lab's own axes."""
    golden = math.pi * (3 - math.sqrt(5))
    rotations = []
    for number in range(AXES):
        turn, tilt = golden * number, math.acos(1 - number / AXES)
        if number in (0, AXES - 1):
            turn = tilt = 0.0
        c, s, d, e = math.cos(turn), math.sin(turn), math.cos(tilt), math.sin(tilt)
        rotations.append(
            [
                [d, -e * c, -e * s],
                [e * c, d * c * c + s * s, (d - 1) * c * s],
                [e * s, (d - 1) * c * s, d * s * s + c * c],
            ]
        )
    return rotations


def guided_coefficients(guide: Tensor, values: Tensor, radius: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return slope and offset of values (1, C, h, w) as lines of the guide (1, 1, h, w), smoothed (He et al.
    2013)."""
    mean_guide, mean_values = _box(guide, radius), _box(values, radius)
    variance = (_box(guide * guide, radius) - mean_guide**2).clamp(min=0)
    slope = (_box(guide * values, radius) - mean_guide * mean_values) / (variance + epsilon)
    return _box(slope, radius), _box(mean_values - slope * mean_guide, radius)


def _box(values: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(values, 2 * radius + 1, 1, radius, count_include_pad=False)


def risen(lab: Tensor, guide: Tensor) -> Tensor:
    """Let lightness rise with the guide's by MIN_RISE at least, within 0 to 100."""
    light, away = lab[:, :1], guide - guide.mean()
    rise = (light * away).mean() / away.square().mean().clamp(min=1)
    light = light + (MIN_RISE - rise).clamp(min=0) * away
    light = light + (-light.amin()).clamp(min=0, max=MAX_LIFT) * (
        rise < MIN_RISE
    )  # black leaves no room below it
    return torch.cat([light.clamp(0, 100), lab[:, 1:]], 1)


def blurred(images: Tensor, std: float) -> Tensor:
    """Blur (N, 1, H, W) by a Gaussian of `std` pixels."""
    reach = min(round(3 * std), images.shape[2] - 1, images.shape[3] - 1)
    places = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-places.square() / (2 * std**2))
    weights = weights / weights.sum()
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights[None, None, None]), weights[None, None, :, None])
