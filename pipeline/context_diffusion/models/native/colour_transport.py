"""Colours of contexts on the pixels of a query, by optimal transport in Lab, smoothed so that the query's
layout stays.

The transport is sliced: along each of a fixed set of axes the query's values are replaced by the contexts' of
the same rank (Pitié et al. 2005; Rabin et al. 2011). What it moves is smoothed by a guided filter whose guide
is the query's lightness (He et al. 2013), computed at a small size (He and Sun 2015). Nothing is drawn by
chance, and every value is found by sorting or by sums over a fixed window, so that a row has equal bits in
any batch.

N images  H W pixels  n samples
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 96  # pixels a side at which colours are transported
SAMPLES = 4096  # pixels of the contexts
AXES = 10  # rotations of the three axes of Lab
STRETCH = (0.01, 0.99)  # quantiles of the query's lightness that become 0 and 100
PLACE = (0.6, 3.0, 3.0)  # Lab units over the image: what pixels of equal colour are ordered by
RADII, EPSILONS = (5, 2), (40.0, 15.0)  # of the two passes of the guided filter; squared units of lightness
MIN_RISE = 0.2  # of lightness with the query's: less makes a query of few tones vanish
MAX_LIFT = 15.0  # lightness by which an image is lifted where that needs room
HUES = 60.0  # squared chroma within a tone from which a context has several hues per tone
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


def palette_of(context: Tensor) -> Tensor:
    """Return the colours of a context, uint8 (1, 3, S, S), Lab (SAMPLES, 3)."""
    side = math.isqrt(SAMPLES)
    small = F.interpolate(
        context.float() / 255, (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return lab_of(small).flatten(2)[0].T.contiguous()


def mixed_palettes(palettes: list[Tensor], weights: list[float]) -> Tensor:
    """Take from each palette (SAMPLES, 3) the share of its weight, evenly over the image. Returns about
    SAMPLES rows."""
    total = sum(weights)
    parts = []
    for palette, weight in zip(palettes, weights, strict=True):
        count = round(SAMPLES * weight / total)
        chosen = (torch.arange(count, device=palette.device).double() + 0.5) * (SAMPLES / max(count, 1))
        parts.append(palette[chosen.long()])
    return torch.cat(parts)


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
    factor = min(1.0, SIDE / min(height, width))
    size = max(round(height * factor), 1), max(round(width * factor), 1)
    small = (
        F.interpolate(query, size, mode="bilinear", align_corners=False, antialias=True)
        if factor < 1
        else query
    )
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
