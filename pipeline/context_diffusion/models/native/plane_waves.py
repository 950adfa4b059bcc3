"""A picture's repeating texture as a few plane waves: stripes, dots, checks and hatching are sharp peaks of
its spectrum, a layout's borders are not. Found one after the other, the strongest first (CLEAN, Högbom 1974),
each by least squares.

Where a texture lies belongs to a style as much as its period does, and a wave tells both: the contexts' waves
can be drawn over any layout, of any size, and nothing of their own layouts comes along.

Every function treats its pictures one by one. N pictures  H W pixels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNT = 16  # waves of a picture
PERIODS = (4.2, 26.0)  # pixels
PEAK = 4.0  # times the median of all waves of about its period: what is less is layout or noise
FAINT = 0.002  # amplitude below which that median is not looked at
RINGS = 12  # groups of like periods
SPOKE, NEAR = 2.0, 5  # times what lies so many steps farther in and out
FINER = 2  # steps of the spectrum to one of a plain Fourier transform


def waves_of(tones: Tensor) -> Tensor:
    """(N, H, W) -> (N, COUNT, 4): cycles a pixel across and down, and the parts of cosine and sine about the
    picture's centre, in the units of the tones; 0 where there are fewer."""
    (height, width), device = tones.shape[1:], tones.device
    down, across = _places(height, device), _places(width, device)
    window = _hann(height, device)[:, None] * _hann(width, device)
    step_y, step_x = 1 / (FINER * height), 1 / (FINER * width)
    fy = torch.arange(0, math.ceil(1 / PERIODS[0] / step_y) + 1, device=device) * step_y
    reach = math.ceil(1 / PERIODS[0] / step_x)
    fx = torch.arange(-reach, reach + 1, device=device) * step_x
    radius = torch.hypot(fy[:, None], fx)
    # Of a wave and its mirror image, which are the same, one.
    usable = (radius >= 1 / PERIODS[1]) & (radius <= 1 / PERIODS[0]) & ((fy[:, None] > 0) | (fx > 0))
    to_y, to_x = (_turns(-f[:, None] * p) for f, p in ((fy, down), (fx, across)))
    rest = _level(tones.float(), down[:, None], across, window)
    found, usual = [], None
    for _ in range(COUNT):
        strength = (to_y @ (rest * window).to(to_y.dtype) @ to_x.T).abs()
        if usual is None:
            usual = _usual(strength, radius, usable).maximum(FAINT * window.sum() / 2)
        ratio = strength / usual
        peak, at = torch.where(usable & _alone(ratio, radius, fy, fx), ratio, 0.0).flatten(1).max(1)
        row, column = at // len(fx), at % len(fx)
        y = fy[row] + _summit(strength, row, column, 1, 0) * step_y
        x = fx[column] + _summit(strength, row, column, 0, 1) * step_x
        wave = _turns(y[:, None, None] * down[:, None] + x[:, None, None] * across)
        parts = _fit(rest, wave, window) * (peak > PEAK)[:, None]
        rest = rest - parts[:, :1, None] * wave.real - parts[:, 1:, None] * wave.imag
        found.append(torch.cat([x[:, None], y[:, None], parts], 1))
    return torch.stack(found, 1)


def draw_waves(waves: Tensor, height: int, width: int) -> Tensor:
    """(N, K, 4) -> (N, H, W): their sum."""
    waves = waves.float()
    turns = 2 * math.pi * waves[..., :2]
    across, down = (
        turns[..., i, None] * _places(size, waves.device) for i, size in enumerate((width, height))
    )
    # c cos(a + b) + s sin(a + b), as products of what depends on one axis each
    cosine, sine = waves[..., 2, None], waves[..., 3, None]
    left = torch.cat([cosine * down.cos() + sine * down.sin(), sine * down.cos() - cosine * down.sin()], 1)
    return left.transpose(1, 2) @ torch.cat([across.cos(), across.sin()], 1)


def _places(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) - (size - 1) / 2


def _hann(size: int, device: torch.device) -> Tensor:
    return torch.hann_window(size + 2, False, device=device)[1:-1]


def _level(tones: Tensor, down: Tensor, across: Tensor, window: Tensor) -> Tensor:
    """Without their mean and what rises evenly, a sky's light say, which would be taken for long waves."""
    for part in (torch.ones_like(window), down.expand_as(window), across.expand_as(window)):
        tones = (
            tones - part * ((tones * part * window).sum((1, 2)) / (part * part * window).sum())[:, None, None]
        )
    return tones


def _turns(cycles: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(cycles), 2 * math.pi * cycles)


def _usual(strength: Tensor, radius: Tensor, usable: Tensor) -> Tensor:
    """The median strength at each radius, (N, h, w): between rings along a line."""
    if strength.device.type == "meta":  # where shapes alone are asked for
        return strength
    low, high = 1 / PERIODS[1], 1 / PERIODS[0]
    place = (radius - low) / (high - low) * RINGS
    ring = place.long().clamp(0, RINGS - 1)
    none = strength.new_full((len(strength),), math.inf)
    medians = [
        strength[:, inside].median(1).values if (inside := usable & (ring == k)).any() else none
        for k in range(RINGS)
    ]
    levels, place = torch.stack(medians, 1), (place - 0.5).clamp(0, RINGS - 1 - 1e-4)
    below, share = place.long(), place.frac()
    mixed = levels[:, below].log() * (1 - share) + levels[:, below + 1].log() * share
    return mixed.exp()


def _alone(ratio: Tensor, radius: Tensor, fy: Tensor, fx: Tensor) -> Tensor:
    """Which stand out along the line from the origin too: a border's spectrum is such a line."""
    height, width = ratio.shape[1:]
    away_y, away_x = (NEAR * part / radius.clamp(min=1e-6) for part in (fy[:, None], fx))
    rows, columns = torch.arange(height, device=fy.device)[:, None], torch.arange(width, device=fy.device)
    most = torch.zeros_like(ratio)
    for side in (-1, 1):
        row, column = rows + (side * away_y).round().long(), columns + (side * away_x).round().long()
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        beside = ratio[:, row.clamp(0, height - 1), column.clamp(0, width - 1)]
        most = torch.where(inside, torch.maximum(most, beside), most)
    return ratio >= SPOKE * most


def _summit(strength: Tensor, row: Tensor, column: Tensor, dy: int, dx: int) -> Tensor:
    """(N,) where between two steps the peak is highest, -.5 to .5: a parabola through three logarithms."""
    rows, (last_y, last_x) = (
        torch.arange(len(row), device=row.device),
        (size - 1 for size in strength.shape[1:]),
    )
    levels = []
    for k in (-1, 0, 1):
        y, x = row + k * dy, column + k * dx
        x = torch.where(y < 0, last_x - x, x)  # above the first row lies the mirror image of what is below it
        levels.append(strength[rows, y.abs().clamp(max=last_y), x.clamp(0, last_x)].clamp(min=1e-9).log())
    before, here, after = levels
    bend = before - 2 * here + after
    return torch.where(bend < -1e-9, 0.5 * (before - after) / bend, 0.0).clamp(-0.5, 0.5)


def _fit(rest: Tensor, wave: Tensor, window: Tensor) -> Tensor:
    """(N, 2): how much of the wave's cosine and sine is in the rest, by least squares under the window."""
    cosine, sine = wave.real, wave.imag
    cc, cs, ss, rc, rs = (
        (window * a * b).sum((1, 2))
        for a, b in ((cosine, cosine), (cosine, sine), (sine, sine), (rest, cosine), (rest, sine))
    )
    determinant = (cc * ss - cs * cs).clamp(min=1e-9)
    return torch.stack([rc * ss - rs * cs, rs * cc - rc * cs], 1) / determinant[:, None]
