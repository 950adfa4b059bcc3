"""Layouts as tone maps: regions, figures, leaves, lines, grids, landscapes and fractal fields.

A layout is float32 (S, S) in [0, 1]: its tone, of mean .5 and std TONE_SPREAD before it is clipped. A style
turns tone into colour (training/data/styles.py), so a query and its target share their tones. Dynamic
normalisation removes a query's own mean and std, so that its exposure does not matter. Deterministic by the
given generator. Knows numpy and OpenCV only."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Tone = NDArray[np.float32]
TONE_SPREAD = 0.26
Rng = np.random.Generator


def smooth_noise(rng: Rng, size: int, cells: int) -> Tone:
    """Draw noise of about `cells` bumps a side, mean 0, std 1."""
    coarse = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    zoom = int(np.ceil(size * (cells + 3) / cells))
    field = cv2.resize(coarse, (zoom, zoom), interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, zoom - size + 1, 2)
    field = field[top : top + size, left : left + size]
    return (field - field.mean()) / (field.std() + 1e-6)


def fractal(rng: Rng, size: int, roughness: float) -> Tone:
    """Sum octaves of noise, each `roughness` as strong as the one before; rescaled to [0, 1]."""
    field = np.zeros((size, size), np.float32)
    for octave, cells in enumerate((2, 4, 8, 16, 32)):
        field += roughness**octave * smooth_noise(rng, size, cells)
    return _unit(field)


def _unit(field: Tone) -> Tone:
    low, high = np.percentile(field, (1, 99))
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def random_tones(rng: Rng, count: int) -> Tone:
    """Draw `count` tones, spread over [0, 1] and shuffled, so that neighbours differ."""
    spread = (np.arange(count) + rng.uniform(0.15, 0.85, count)) / count
    return rng.permutation(spread).astype(np.float32)


def _figure(rng: Rng, centre: NDArray[np.float64], radius: float) -> NDArray[np.int32]:
    """Draw a polygon's corners: from triangle to nearly round, star or blob, turned at random."""
    corners = int(rng.choice([3, 4, 4, 5, 6, 8, 24]))
    angles = (
        np.sort(rng.uniform(0, 2 * np.pi, corners))
        if rng.random() < 0.3
        else np.arange(corners) * 2 * np.pi / corners
    )
    radii = radius * np.where(
        np.arange(corners) % 2 == 0, 1.0, rng.uniform(0.4, 1.0) if rng.random() < 0.4 else 1.0
    )
    angles = angles + rng.uniform(0, 2 * np.pi)
    points = centre + np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.5, 1)], 1) * radii[:, None]
    return (points * 16).astype(np.int32)  # 4 fractional bits for cv2's anti-aliased fill


def _fill(canvas: Tone, points: NDArray[np.int32], tone: float) -> None:
    cv2.fillPoly(canvas, [points], float(tone), lineType=cv2.LINE_8, shift=4)


def regions(rng: Rng, size: int) -> Tone:
    """Cut smooth noise into 2 to 6 levels."""
    field = smooth_noise(rng, size, int(rng.integers(2, 9)))
    levels = int(rng.integers(2, 7))
    cuts = np.quantile(field, np.sort(rng.uniform(0.1, 0.9, levels - 1)))
    return random_tones(rng, levels)[np.digitize(field, cuts)]


def figures(rng: Rng, size: int) -> Tone:
    """Draw 1 to 10 figures on a background."""
    count = int(rng.integers(1, 11))
    tones = random_tones(rng, count + 1)
    canvas = np.full((size, size), tones[0], np.float32)
    for tone in tones[1:]:
        _fill(canvas, _figure(rng, rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.06, 0.35) * size), tone)
    return canvas


def dead_leaves(rng: Rng, size: int) -> Tone:
    """Draw overlapping figures with power-law radii: the statistics of natural images (Lee, Mumford and Huang
    2001)."""
    canvas = np.full((size, size), rng.random(), np.float32)
    for _ in range(int(rng.integers(30, 140))):
        radius = size * min(0.4, 0.035 * rng.pareto(1.6) + 0.02)
        _fill(canvas, _figure(rng, rng.uniform(0, 1, 2) * size, radius), rng.random())
    return canvas


def lines(rng: Rng, size: int) -> Tone:
    """Draw thin and thick curves on a background of one or two tones."""
    tones = random_tones(rng, 4)
    canvas = np.where(smooth_noise(rng, size, 2) > rng.uniform(-1, 3), tones[0], tones[1]).astype(np.float32)
    for _ in range(int(rng.integers(2, 14))):
        steps = np.cumsum(rng.normal(0, rng.uniform(0.1, 0.7), 40))
        walk = (
            np.cumsum(np.stack([np.cos(steps), np.sin(steps)], 1), 0) * size / 25
            + rng.uniform(0, 1, 2) * size
        )
        cv2.polylines(
            canvas, [walk.astype(np.int32)], False, float(rng.choice(tones[2:])), int(rng.integers(1, 7))
        )
    return canvas


def grid(rng: Rng, size: int) -> Tone:
    """Repeat one figure in rows, with jitter: coins, windows, bricks."""
    tones = random_tones(rng, 3)
    canvas = np.full((size, size), tones[0], np.float32)
    pitch = size / int(rng.integers(2, 8))
    jitter, radius = rng.uniform(0, 0.15), rng.uniform(0.25, 0.5) * pitch
    shape = _figure(rng, np.zeros(2), radius)
    for y in np.arange(pitch / 2, size, pitch):
        for x in np.arange(pitch / 2, size, pitch):
            place = (np.array([x, y]) + rng.normal(0, jitter, 2) * pitch) * 16
            _fill(canvas, shape + place.astype(np.int32), rng.choice(tones[1:]))
    return canvas


def landscape(rng: Rng, size: int) -> Tone:
    """Draw sky, sun, overlapping ridges, and trees or houses on the nearest."""
    ridges = int(rng.integers(1, 5))
    tones: Tone = np.sort(random_tones(rng, ridges + 2)).astype(np.float32)
    if rng.random() < 0.5:
        tones = tones[::-1]
    x = np.arange(size)
    canvas = np.repeat((tones[0] + np.linspace(-0.08, 0.08, size))[:, None], size, 1).astype(np.float32)
    if rng.random() < 0.6:
        centre = tuple(int(v) for v in rng.uniform(0.15, 0.85, 2) * (size, size / 2))
        cv2.circle(canvas, centre, int(rng.uniform(0.05, 0.14) * size), float(rng.random()), -1)
    horizon = rng.uniform(0.25, 0.55)
    for ridge in range(ridges):
        height = horizon + (1 - horizon) * ridge / ridges
        profile = (
            height * size
            + rng.uniform(0.02, 0.1) * size * smooth_noise(rng, size, int(rng.integers(2, 12)))[0]
        )
        canvas[np.arange(size)[:, None] > profile[None]] = tones[ridge + 1]
    if rng.random() < 0.3:
        _reflect(rng, canvas, int(rng.uniform(0.55, 0.8) * size))
    for foot in rng.choice(x, int(rng.integers(0, 9))):
        base, tall = int(profile[foot]) + 3, int(rng.uniform(0.08, 0.3) * size)
        wide = int(tall * rng.uniform(0.2, 0.5))
        corners = [(foot - wide, base), (foot, base - tall), (foot + wide, base)]
        if rng.random() < 0.4:
            corners = [
                (foot - wide, base),
                (foot - wide, base - tall),
                (foot + wide, base - tall),
                (foot + wide, base),
            ]
        cv2.fillPoly(canvas, [np.array(corners, np.int32)], float(tones[-1]))
    return canvas


def _reflect(rng: Rng, canvas: Tone, shore: int) -> None:
    """Draw water below the shore, in place: a rippled, dimmed reflection of what is above it."""
    size = len(canvas)
    depth = np.arange(size - shore)
    ripple = rng.uniform(0, 0.02) * size * np.sin(2 * np.pi * depth / rng.uniform(3, 9)) * rng.uniform(0.2, 1)
    mirrored = canvas[np.clip(shore - 1 - depth + ripple.astype(int), 0, shore - 1)]
    canvas[shore:] = mirrored * rng.uniform(0.5, 0.85) + rng.uniform(0, 0.15)


def solids(rng: Rng, size: int) -> Tone:
    """Draw ellipsoids lit from one side on a shaded background: faces, fruit, pebbles."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    light = rng.normal(0, 1, 3) + np.array([0.0, 0.0, 1.0])
    light /= np.linalg.norm(light)
    tones = random_tones(rng, count := int(rng.integers(2, 14)))
    canvas: Tone = (tones[0] + rng.normal(0, 0.2) * x + rng.normal(0, 0.2) * y).astype(np.float32)
    for tone in tones[1:]:
        radius = rng.uniform(0.05, 0.4) / np.sqrt(count / 4)
        turn, flat = rng.uniform(0, np.pi), rng.uniform(0.4, 1)
        dx, dy = x - rng.uniform(-0.45, 0.45), y - rng.uniform(-0.45, 0.45)
        across, down = (
            (dx * np.cos(turn) + dy * np.sin(turn)) / radius,
            (dy * np.cos(turn) - dx * np.sin(turn)) / radius / flat,
        )
        inside = across**2 + down**2
        height = np.sqrt(np.clip(1 - inside, 0, 1))
        lit = np.clip(across * light[0] + down * light[1] + height * light[2], 0, 1)
        canvas = np.where(inside < 1, tone * (0.45 + 0.55 * lit) + 0.25 * lit**12, canvas)
    return canvas.astype(np.float32)


def fields(rng: Rng, size: int) -> Tone:
    """Draw a fractal field, unchanged or cut into a few tones."""
    field = fractal(rng, size, rng.uniform(0.35, 0.75))
    if rng.random() < 0.5:
        levels = int(rng.integers(3, 7))
        return (np.round(field * (levels - 1)) / (levels - 1)).astype(np.float32)
    return field


def composite(rng: Rng, size: int) -> Tone:
    """Join two layouts along the outline of a blob."""
    first, second = (
        FAMILIES[name](rng, size)
        for name in rng.choice(["regions", "figures", "fields", "lines", "solids"], 2)
    )
    mask = smooth_noise(rng, size, int(rng.integers(2, 4))) > rng.uniform(-0.3, 0.6)
    return np.where(mask, 0.5 * first, 0.5 + 0.5 * second).astype(np.float32)


def maze(rng: Rng, size: int) -> Tone:
    """Draw a diagonal wall in each cell of a grid, one way or the other."""
    tones = random_tones(rng, 3)
    canvas = np.where(smooth_noise(rng, size, 2) > 0, tones[0], tones[1]).astype(np.float32)
    cells = int(rng.integers(4, 11))
    pitch, thick = size / cells, max(2, int(rng.uniform(0.12, 0.35) * size / cells))
    for row, column in np.ndindex(cells, cells):
        left, right = sorted([column * pitch, (column + 1) * pitch], reverse=bool(rng.random() < 0.5))
        top, bottom = row * pitch, (row + 1) * pitch
        cv2.line(canvas, (int(left), int(top)), (int(right), int(bottom)), float(tones[2]), thick)
    return canvas


def rings(rng: Rng, size: int) -> Tone:
    """Draw rings and spirals around a few centres."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    canvas, nearest = np.zeros((size, size), np.float32), np.full((size, size), np.inf, np.float32)
    for _ in range(int(rng.integers(1, 4))):
        dx, dy = x - rng.uniform(0, size), y - rng.uniform(0, size)
        radius = np.hypot(dx, dy)
        turns = radius * rng.uniform(2, 7) / size + rng.integers(-2, 3) * np.arctan2(dy, dx) / (2 * np.pi)
        tones = random_tones(rng, int(rng.integers(2, 5)))
        turned = tones[(np.floor(turns * len(tones)).astype(int)) % len(tones)]
        canvas = np.where(radius < nearest, turned, canvas)
        nearest = np.minimum(radius, nearest)
    return canvas.astype(np.float32)


FAMILIES: dict[str, Callable[[Rng, int], Tone]] = {
    "regions": regions,
    "figures": figures,
    "dead_leaves": dead_leaves,
    "lines": lines,
    "grid": grid,
    "landscape": landscape,
    "solids": solids,
    "fields": fields,
    "composite": composite,
}


HELD_OUT_FAMILIES: dict[str, Callable[[Rng, int], Tone]] = {"maze": maze, "rings": rings}


def make_layout(rng: Rng, size: int = 128, held_out: bool = False) -> tuple[str, Tone]:
    """Draw a layout of a random family, some with soft borders, shading or fine detail; return (family, tone
    (size, size)).

    held_out: every second one is of a family that training never sees."""
    families = HELD_OUT_FAMILIES if held_out and rng.random() < 0.5 else FAMILIES
    family = str(rng.choice(list(families)))
    return family, finished(rng, families[family](rng, 2 * size), size)


def finished(rng: Rng, tone: Tone, size: int) -> Tone:
    """Finish a layout drawn at twice the size: the area filter is the anti-aliasing. Some get soft borders,
    shading, detail."""
    tone = np.asarray(cv2.resize(tone, (size, size), interpolation=cv2.INTER_AREA), np.float32)
    if rng.random() < 0.3:
        tone = np.asarray(cv2.GaussianBlur(tone, (0, 0), rng.uniform(0.5, 2.5)))
    if rng.random() < 0.5:
        tone = tone + rng.uniform(0.02, 0.12) * smooth_noise(rng, size, int(rng.integers(1, 4)))
    if rng.random() < 0.3:
        tone = tone + rng.uniform(0.02, 0.1) * (fractal(rng, size, 0.8) - 0.5)
    tone = 0.5 + TONE_SPREAD * (tone - tone.mean()) / max(float(tone.std()), 0.02)
    return np.clip(tone, 0, 1).astype(np.float32)
