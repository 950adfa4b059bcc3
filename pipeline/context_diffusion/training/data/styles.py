"""Styles: a palette from dark to light, a texture, an outline, light and grain. A style turns tones into
colours.

Palettes rise in lightness, so a layout's tones decide where each colour goes, in generated images and in
photographs. Knows numpy and OpenCV only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.training.data.layouts import Rng, Tone, smooth_noise

# Stops from dark to light, named by their overall look.
PALETTES: dict[str, tuple[str, ...]] = {
    "autumn": ("2b1208", "7a2c0f", "c2541b", "e09a3a", "f4dba0"),
    "ocean": ("041a33", "0b3f73", "1f7fb0", "63bcd6", "d9f2f5"),
    "forest": ("0b1d10", "1f4023", "4a7a37", "91b25a", "e2ebb0"),
    "sunset": ("24123f", "6d1f5e", "c8395a", "f5834b", "ffe08a"),
    "rose": ("3a0a1e", "8a2148", "cf5682", "eda3b9", "fde8ea"),
    "ice": ("12263a", "3d6480", "86afc4", "c3dde6", "f6fcff"),
    "desert": ("3b2412", "86572c", "c49357", "e3c592", "f9efd6"),
    "neon": ("12002b", "5b00b5", "e0129b", "18d8c8", "f2ff5a"),
    "candy": ("50184f", "b0489a", "f286b0", "8fd8d2", "fff3c9"),
    "mono": ("0d0d0d", "444444", "808080", "bcbcbc", "f2f2f2"),
    "ember": ("0d0202", "4a0905", "a81c07", "ee5f12", "ffd15c"),
    "moss": ("1a1c0c", "44491f", "757a3a", "aeb06b", "e6e3b8"),
    "violet": ("150a2e", "3d2273", "7350b0", "ad8fd8", "eaddf7"),
    "lagoon": ("05231f", "0f554c", "23948a", "6fcfae", "e4f8d0"),
}
TEXTURES = ("flat", "stripes", "dots", "checks", "grain", "hatching", "waves", "gradient", "brush", "glass")
# Pairs that training never shows together: validation uses them.
HELD_OUT = {
    ("autumn", "dots"),
    ("ocean", "checks"),
    ("rose", "stripes"),
    ("mono", "waves"),
    ("lagoon", "hatching"),
    ("neon", "grain"),
    ("forest", "brush"),
    ("sunset", "glass"),
}


@dataclass(frozen=True)
class Style:
    """A style. lut: float32 (256, 3) RGB in [0, 1] by tone. band: which tones carry the texture: all, dark or
    light."""

    palette: str
    texture: str
    lut: NDArray[np.float32]
    period: float
    angle: float
    strength: float
    band: str
    outline: float  # 0: none; else how strongly borders are drawn, < 0 lighter
    light: tuple[float, float]  # how brightness falls off to the right and down
    grain: float


def make_lut(rng: Rng, palette: str) -> NDArray[np.float32]:
    """Draw a variation of a named palette, or a `random` one; float32 (256, 3)."""
    if palette == "random":
        lightness = np.sort(rng.uniform(8, 250, 5)).astype(np.float32)
        lab = np.stack([lightness, *(128 + rng.normal(0, 32, (2, 5)).astype(np.float32))], 1)
        lab[:, 1:] = 128 + np.cumsum(lab[:, 1:] - 128, 0) * rng.uniform(0.4, 0.8)
    else:
        stops = np.array(
            [[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in PALETTES[palette]], np.uint8
        )
        lab = cv2.cvtColor(stops[None], cv2.COLOR_RGB2LAB)[0].astype(np.float32)
        lab += rng.normal(0, (6, 4, 4), (5, 3)).astype(np.float32)
    # Mostly the palette's own contrast, sometimes a third of it; over- and under-exposed by up to two
    # stops.
    span = rng.uniform(0.3, 0.65) if rng.random() < 0.25 else rng.uniform(0.65, 1.05)
    shift = rng.normal(0, 18)
    lab[:, 0] = np.sort((lab[:, 0] - 128) * span + 128 + shift)
    places = np.array([0, *np.sort(rng.uniform(0.15, 0.85, 3)), 1.0])
    curve = np.stack([np.interp(np.linspace(0, 1, 256), places, lab[:, c]) for c in range(3)], 1)
    pixels = np.clip(curve, 0, 255).astype(np.uint8)[None]
    return (cv2.cvtColor(pixels, cv2.COLOR_LAB2RGB)[0] / np.float32(255)).astype(np.float32)


def _texture(rng: Rng) -> str:
    """Draw a texture, flat about half of the time, as most of a photograph is."""
    return "flat" if rng.random() < 0.4 else str(rng.choice(TEXTURES))


def make_style(rng: Rng, held_out: bool = False) -> Style:
    """Draw a random style; its palette and texture are one of the held-out pairs or never one."""
    if held_out:
        palette, texture = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
    else:
        palette, texture = "random", _texture(rng)
        if rng.random() < 0.6:
            palette = str(rng.choice(list(PALETTES)))
        while (palette, texture) in HELD_OUT:
            texture = _texture(rng)
    return Style(
        palette,
        texture,
        make_lut(rng, palette),
        period=rng.uniform(9, 22),
        angle=rng.uniform(0, np.pi),
        strength=rng.uniform(0.14, 0.28),
        band=str(rng.choice(["all", "all", "all", "dark", "light"])),
        outline=rng.choice([0.0, 0.0, 0.0, 0.6, -0.6]) * rng.uniform(0.5, 1),
        light=(rng.normal(0, 0.06), rng.normal(0, 0.06)),
        grain=max(0.0, rng.normal(0, 0.008)),
    )


def vary(rng: Rng, style: Style) -> tuple[str, Style]:
    """Return (`palette` or `texture`, the style with another one of it); from it the model learns to follow
    the prompt."""
    if rng.random() < 0.5:
        palette = str(
            rng.choice([p for p in PALETTES if p != style.palette and (p, style.texture) not in HELD_OUT])
        )
        return "palette", replace(style, palette=palette, lut=make_lut(rng, palette))
    texture = str(
        rng.choice([t for t in TEXTURES if t != style.texture and (style.palette, t) not in HELD_OUT])
    )
    return "texture", replace(style, texture=texture)


def _strokes(rng: Rng, size: int, period: float, angle: float) -> Tone:
    """Draw noise stretched along the angle: brush strokes."""
    length = 2 * int(period) + 1
    places = np.linspace(-length / 2, length / 2, length)
    kernel = np.zeros((length, length), np.float32)
    kernel[
        (length // 2 + 0.98 * places * np.sin(angle)).astype(int),
        (length // 2 + 0.98 * places * np.cos(angle)).astype(int),
    ] = 1
    noise = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), 0.8)
    field = cv2.filter2D(noise, -1, kernel, borderType=cv2.BORDER_REFLECT)
    return np.clip(0.8 * field / (field.std() + 1e-6), -1, 1).astype(np.float32)


def _facets(rng: Rng, size: int, period: float) -> Tone:
    """Draw cells around random points, each of one tone: a mosaic, stained glass."""
    points = np.ones((size, size), np.uint8)
    count = max(4, int((size / period) ** 2))
    points[rng.integers(0, size, count), rng.integers(0, size, count)] = 0
    _, cells = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return rng.uniform(-1, 1, cells.max() + 1).astype(np.float32)[cells]


def texture_field(style: Style, size: int, rng: Rng) -> Tone:
    """Return the texture alone, float32 (size, size) in [-1, 1]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    along = (x * np.cos(style.angle) + y * np.sin(style.angle)) * np.float32(2 * np.pi / style.period)
    across = (y * np.cos(style.angle) - x * np.sin(style.angle)) * np.float32(2 * np.pi / style.period)
    if style.texture == "stripes":
        return np.clip(3 * np.sin(along), -1, 1)
    if style.texture == "dots":
        return np.clip(4 * (np.cos(along) + np.cos(across) - 1.0), -1, 1)
    if style.texture == "checks":
        return np.clip(6 * np.sin(along / 1.5) * np.sin(across / 1.5), -1, 1)
    if style.texture == "hatching":
        return np.clip(4 * (np.cos(along * 1.3) - 0.6), -1, 0.6)
    if style.texture == "waves":
        return np.clip(3 * np.sin(along + 1.5 * np.sin(across / 2)), -1, 1)
    if style.texture == "grain":
        return np.clip(0.8 * smooth_noise(rng, size, size // 3), -1, 1)
    if style.texture == "gradient":
        ramp = (x - size / 2) * np.cos(style.angle) + (y - size / 2) * np.sin(style.angle)
        return (1.5 * ramp / np.abs(ramp).max()).astype(np.float32)
    if style.texture == "brush":
        return _strokes(rng, size, style.period, style.angle)
    if style.texture == "glass":
        return _facets(rng, size, style.period)
    return np.zeros((size, size), np.float32)


def dress(tone: Tone, style: Style, rng: Rng) -> NDArray[np.uint8]:
    """Draw a layout in a style, uint8 (S, S, 3). rng: for grain and random textures; the others depend on the
    style alone."""
    size = tone.shape[0]
    weight = {"all": np.ones_like(tone), "dark": 1 - tone, "light": tone}[style.band]
    shaded = tone + style.strength * weight * texture_field(style, size, rng)
    image = style.lut[(np.clip(shaded, 0, 1) * 255).astype(np.uint8)]
    if style.outline:
        border = np.hypot(cv2.Sobel(tone, cv2.CV_32F, 1, 0), cv2.Sobel(tone, cv2.CV_32F, 0, 1))
        outlined = np.clip(border * 1.5 - 0.25, 0, 1)[..., None] * abs(style.outline)
        image = image * (1 - outlined) + style.lut[0 if style.outline > 0 else 255] * outlined
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    image = image * (1 + style.light[0] * ramp[None, :, None] + style.light[1] * ramp[:, None, None])
    if style.grain:
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * style.grain
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
