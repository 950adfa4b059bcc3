"""More kinds of layouts, for texture separation: crowded, repeating and regular ones, which are no textures.

Knows numpy and OpenCV only. Every function returns tones, float32 (size, size).
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from context_diffusion.training.data.layouts import FAMILIES, Rng, Tone, finished, random_tones, smooth_noise


def bands(rng: Rng, size: int) -> Tone:
    """Draw level bands of a smooth field, as on a map."""
    field, tones = (
        smooth_noise(rng, size, int(rng.integers(1, 6))),
        random_tones(rng, int(rng.integers(2, 6))),
    )
    return tones[np.floor(field * rng.uniform(1, 5) + rng.random()).astype(int) % len(tones)]


def zebra(rng: Rng, size: int) -> Tone:
    """Cut noise of one wavelength into two or three tones, as on coats of animals."""
    noise, wave, squeeze = (
        rng.standard_normal((size, size), dtype=np.float32),
        rng.uniform(0.012, 0.06) * size,
        rng.uniform(0.5, 1),
    )
    fine, coarse = (cv2.GaussianBlur(noise, (0, 0), k * wave, sigmaY=k * wave * squeeze) for k in (1.0, 1.6))
    levels = int(rng.integers(2, 4))
    cuts = np.quantile(fine - coarse, np.sort(rng.uniform(0.25, 0.75, levels - 1)))
    return random_tones(rng, levels)[np.digitize(fine - coarse, cuts)]


def _ground(rng: Rng, size: int, tones: Tone) -> Tone:
    """Draw a background of one or two tones."""
    return np.where(smooth_noise(rng, size, 2) > rng.uniform(-1, 2), tones[0], tones[1]).astype(np.float32)


def streets(rng: Rng, size: int) -> Tone:
    """Draw straight roads in two or three directions, crossing or ending."""
    tones = random_tones(rng, 4)
    canvas, length = _ground(rng, size, tones), rng.uniform(0.05, 0.6) * size
    turns = (rng.uniform(0, np.pi) + np.array([0, np.pi / 2, rng.uniform(0.3, 1.2)]))[
        : int(rng.integers(2, 4))
    ]
    for _ in range(int(rng.integers(4, 70))):
        turn, half = rng.choice(turns), rng.uniform(0.2, 1) * length
        at, way = rng.uniform(0, 1, 2) * size, np.array([np.cos(turn), np.sin(turn)]) * half
        ends = np.stack([at - way, at + way]).astype(np.int32)
        cv2.polylines(canvas, [ends], False, float(rng.choice(tones[2:])), int(rng.integers(2, 14)))
    return canvas


def blocks(rng: Rng, size: int) -> Tone:
    """Divide a rectangle in two repeatedly, with or without joints."""
    parts, joint = [(0, 0, size, size)], int(rng.integers(0, 7))
    for _ in range(int(rng.integers(3, 60))):
        largest = max(range(len(parts)), key=lambda i: parts[i][2] * parts[i][3] * (0.4 + 0.6 * rng.random()))
        x, y, w, h = parts.pop(largest)
        share = rng.uniform(0.25, 0.75)
        if w * rng.uniform(0.6, 1.6) > h:
            parts += [(x, y, cut := int(w * share), h), (x + cut, y, w - cut, h)]
        else:
            parts += [(x, y, w, cut := int(h * share)), (x, y + cut, w, h - cut)]
    tones = random_tones(rng, int(rng.integers(2, 7)))
    canvas = np.full((size, size), rng.random(), np.float32)
    for x, y, w, h in parts:
        canvas[y : y + h - joint, x : x + w - joint] = rng.choice(tones)
    return canvas


def letters(rng: Rng, size: int) -> Tone:
    """Draw text of all sizes."""
    tones = random_tones(rng, 4)
    canvas = _ground(rng, size, tones)
    for _ in range(int(rng.integers(2, 25))):
        word, scale = (
            "".join(map(chr, rng.integers(33, 127, int(rng.integers(1, 8))))),
            rng.uniform(0.4, 5) * size / 256,
        )
        place = tuple(int(v) for v in rng.uniform(-0.1, 1, 2) * size)
        mask = np.zeros((size, size), np.uint8)
        cv2.putText(
            mask, word, place, int(rng.integers(0, 8)), scale, 255, max(1, int(scale * rng.uniform(1, 5)))
        )
        canvas[mask > 127] = rng.choice(tones[2:])
    return canvas


def rays(rng: Rng, size: int) -> Tone:
    """Draw sectors around one or two centres: fans, wheels, palm leaves."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    first = smooth_noise(rng, size, 2) > rng.uniform(-1.5, 1.5)
    sides = []
    for _ in range(2):
        turn = (
            np.arctan2(y - rng.uniform(0, size), x - rng.uniform(0, size))
            / (2 * np.pi)
            * int(rng.integers(4, 40))
        )
        tones = random_tones(rng, int(rng.integers(2, 4)))
        sides.append(tones[np.floor(turn).astype(int) % len(tones)])
    return np.where(first, *sides).astype(np.float32)


def cells(rng: Rng, size: int) -> Tone:
    """Draw cells around random or regular points, with or without walls."""
    points = rng.uniform(0, 1, (int(rng.integers(10, 160)), 2))
    if rng.random() < 0.4:
        side = int(np.sqrt(len(points))) + 1
        places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(float)
        places[:, 0] += 0.5 * (places[:, 1] % 2)
        points = (places + rng.normal(0, rng.uniform(0, 0.2), places.shape)) / side
    at, seeds = np.clip((points * size).astype(int), 0, size - 1), np.ones((size, size), np.uint8)
    seeds[at[:, 1], at[:, 0]] = 0
    _, cell = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    canvas = rng.choice(random_tones(rng, int(rng.integers(2, 6))), cell.max() + 1)[cell].astype(np.float32)
    if rng.random() < 0.5:
        near, number = np.ones((3, 3), np.uint8), cell.astype(np.float32)
        wall = (cv2.dilate(number, near) != cv2.erode(number, near)).astype(np.uint8)
        canvas[cv2.dilate(wall, np.ones((int(rng.integers(1, 9)),) * 2, np.uint8)) > 0] = rng.random()
    return canvas


def nets(rng: Rng, size: int) -> Tone:
    """Draw many curves of one width and one or two tones: threads, branches, rivers."""
    tones = random_tones(rng, 4)
    canvas, width, bend = _ground(rng, size, tones), int(rng.integers(2, 12)), rng.uniform(0.05, 0.6)
    for _ in range(int(rng.integers(8, 60))):
        turns = np.cumsum(rng.normal(0, bend, 40)) + rng.uniform(0, 2 * np.pi)
        walk = (
            np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1), 0) * size / 40
            + rng.uniform(0, 1, 2) * size
        )
        cv2.polylines(canvas, [walk.astype(np.int32)], False, float(rng.choice(tones[2:])), width)
    return canvas


VARIED: dict[str, Callable[[Rng, int], Tone]] = {
    family.__name__: family for family in (bands, zebra, streets, blocks, letters, rays, cells, nets)
}


def _any(rng: Rng, size: int) -> Tone:
    families = VARIED if rng.random() < 0.6 else FAMILIES
    return families[str(rng.choice(list(families)))](rng, size)


def varied_layout(rng: Rng, size: int) -> Tone:
    """Draw a layout of these families or of layouts.FAMILIES, never of the held-out ones; some are joined,
    turned or warped."""
    double = 2 * size  # the area filter of `finished` is the anti-aliasing
    tone = _any(rng, double)
    if rng.random() < 0.25:
        first, apart = (
            smooth_noise(rng, double, int(rng.integers(1, 4))) > rng.uniform(-0.6, 0.6),
            0.4 * (rng.random() < 0.5),
        )
        tone = np.where(first, (1 - apart) * tone, apart + (1 - apart) * _any(rng, double))
    tone = tone.astype(np.float32)
    if rng.random() < 0.4:
        turn = cv2.getRotationMatrix2D((size, size), rng.uniform(0, 360), rng.uniform(0.7, 1.8))
        tone = np.asarray(cv2.warpAffine(tone, turn, (double, double), borderMode=cv2.BORDER_REFLECT))
    if rng.random() < 0.25:
        y, x = np.mgrid[:double, :double].astype(np.float32)
        strong, bumps = rng.uniform(2, 14), int(rng.integers(2, 6))
        right, down = (
            (axis + strong * smooth_noise(rng, double, bumps)).astype(np.float32) for axis in (x, y)
        )
        tone = np.asarray(cv2.remap(tone, right, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))
    return finished(rng, tone, size)
