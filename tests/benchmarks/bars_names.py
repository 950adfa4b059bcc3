"""Names an image's texture and palette: renders its layout in each of them and takes the most similar one.

    python tests/benchmarks/bars_names.py [MODEL] [--rows 128]     how often it is right on true pictures, the
    ceiling

Nothing is learned, so nothing is shared with the model and its scores but the generator. Lightness is taken
without what the layout's tone explains, so that colours don't matter to the texture; the texture's phase is
never the same twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import cv2
import numpy as np
from bars_rows import Row, given_model, held_out_rows
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels
from context_diffusion.training.data.layouts import Rng, Tone
from context_diffusion.training.data.styles import PALETTES, TEXTURES, Style, dress, make_lut

TONES, FEW = 24, 20  # steps of tone; pixels without which a step tells nothing
PERIODS, ANGLES = (7, 11, 16, 24), 8
BLUR = 1.5  # pixels: sharpness and an autoencoder's hiss are not the texture's
SHIFT = 40  # pixels by which a phase may differ
DRAWS = 300  # of a palette
WEIGHTS = np.array([0.3, 1, 1], np.float32)  # of lightness and colours: exposure is not the palette's

Features = NDArray[np.float64]


@cache
def filters() -> list[tuple[Tone, Tone]]:
    """Gabor pairs: cosine and sine under a Gaussian, without a mean."""
    made = []
    for period in PERIODS:
        half = period
        y, x = np.mgrid[-half : half + 1, -half : half + 1]
        window = np.exp(-(x * x + y * y) / (2 * (period / 2) ** 2))
        window /= window.sum()
        for angle in np.pi * np.arange(ANGLES) / ANGLES:
            phase = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period
            even = (np.cos(phase) - (window * np.cos(phase)).sum()) * window
            made.append((even.astype(np.float32), (np.sin(phase) * window).astype(np.float32)))
    return made


def steps_of(tone: Tone) -> NDArray[np.int64]:
    return np.minimum((tone * TONES).astype(np.int64), TONES - 1)


def residual(image: Pixels, tone: Tone) -> Tone:
    """Lightness without its mean at each tone of the layout."""
    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0].astype(np.float32)
    steps = steps_of(tone).ravel()
    counts = np.bincount(steps, minlength=TONES)
    known = np.flatnonzero(counts > FEW)
    means = np.bincount(steps, lightness.ravel(), TONES)[known] / counts[known]
    rest = lightness - np.interp(tone * TONES - 0.5, known, means).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(rest, (0, 0), BLUR))


def features(image: Pixels, tone: Tone) -> Features:
    """Energies by period and angle, and the skewness, which tells dots from hatching; away from borders."""
    border = np.hypot(cv2.Sobel(tone, cv2.CV_32F, 1, 0), cv2.Sobel(tone, cv2.CV_32F, 0, 1))
    weight = (cv2.dilate(border, np.ones((3, 3))) < 0.3) + 0.02
    weight /= weight.sum()
    rest = residual(image, tone)
    energies = [
        (np.hypot(cv2.filter2D(rest, -1, even), cv2.filter2D(rest, -1, odd)) * weight).sum()
        for even, odd in filters()
    ]
    centred = rest - (rest * weight).sum()
    variance, third = ((centred**power * weight).sum() for power in (2, 3))
    return np.array([*np.log(np.array(energies) + 0.5), third / (variance**1.5 + 1)])


def moved(tone: Tone, style: Style, rng: Rng) -> Pixels:
    """The layout in the style, its texture at another phase."""
    size = tone.shape[0]
    y, x = rng.integers(0, SHIFT, 2)
    wide = cv2.copyMakeBorder(tone, y, SHIFT - y, x, SHIFT - x, cv2.BORDER_REFLECT)
    image = dress(wide, replace(style, light=(0.0, 0.0)), rng)
    return image[y : y + size, x : x + size]


def texture_of(image: Pixels, tone: Tone, styles: Iterable[Style], turned: bool = False) -> str:
    """The texture of that one of these styles in which the layout looks most like the picture. turned: at any
    angle."""
    seen, best = features(image, tone), (np.inf, "")
    for number, style in enumerate(styles):
        candidate = features(moved(tone, style, np.random.default_rng((5, number))), tone)
        energies, rest = candidate[:-1].reshape(len(PERIODS), ANGLES), candidate[-1:]
        for turn in range(ANGLES if turned else 1):
            other = np.concatenate([np.roll(energies, turn, 1).ravel(), rest])
            best = min(best, (float(np.square(seen - other).sum()), style.texture))
    return best[1]


def textures_like(style: Style, draws: int = 3) -> list[Style]:
    """The style in all textures: what a picture with its contexts could look like."""
    return [replace(style, texture=texture) for texture in TEXTURES for _ in range(draws)]


def any_texture(style: Style) -> list[Style]:
    """The same with periods and strengths of all kinds: what a prompt could mean that names a texture."""
    shapes = [
        {"period": p, "strength": s, "band": "all"} for p in (9, 11, 13, 16, 19, 22) for s in (0.16, 0.25)
    ]
    return [replace(style, texture=texture, **shape) for texture in TEXTURES for shape in shapes]  # type: ignore[arg-type]


def lab(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB in [0, 1] (N, 3) -> Lab."""
    return cv2.cvtColor(colours.astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0]


@cache
def palettes() -> NDArray[np.float32]:
    """(palettes, DRAWS, TONES, 3): Lab by tone of many draws of each palette, lightness at its weight."""
    rng, centres = np.random.default_rng(7), ((np.arange(TONES) + 0.5) * 256 / TONES).astype(int)
    return np.stack(
        [[lab(make_lut(rng, name)[centres]) * WEIGHTS for _ in range(DRAWS)] for name in PALETTES]
    )


def palette_of(image: Pixels, tone: Tone) -> str:
    """The named palette of which a draw is nearest to the colours of the layout's tones."""
    steps = steps_of(tone).ravel()
    counts = np.bincount(steps, minlength=TONES)
    colours = lab(image.reshape(-1, 3) / np.float32(255)) * WEIGHTS
    known = counts > FEW
    seen = (
        np.stack([np.bincount(steps, colours[:, c], TONES) for c in range(3)], 1)[known] / counts[known, None]
    )
    distances = np.square(seen - palettes()[:, :, known]).sum(3) @ counts[known]
    return list(PALETTES)[distances.min(1).argmin()]


def names(images: list[Pixels], rows: list[Row]) -> tuple[float, float]:
    """The shares of pictures whose texture is their row's, and whose palette, where that has a name."""
    pairs = list(zip(images, rows, strict=True))
    texture = [
        texture_of(image, row.tone, textures_like(row.style)) == row.style.texture for image, row in pairs
    ]
    palette = [
        palette_of(image, row.tone) == row.style.palette
        for image, row in pairs
        if row.style.palette != "random"
    ]
    return float(np.mean(texture)), float(np.mean(palette))


if __name__ == "__main__":
    from bars_layout import copies

    given, model, _ = given_model(__doc__)
    cv2.setNumThreads(1)
    rows = held_out_rows(given.rows, model.image_size, seed=77)
    truth = [moved(row.tone, row.style, np.random.default_rng((99, i))) for i, row in enumerate(rows)]
    for what, images in (
        ("true pictures, another phase", truth),
        ("the autoencoder's copies of them", copies(model, truth)),
    ):
        print("{}: texture {:.3f}, palette {:.3f}".format(what, *names(images, rows)), flush=True)
    loose = [
        texture_of(image, row.tone, any_texture(row.style), turned=True) == row.style.texture
        for image, row in zip(truth, rows, strict=True)
    ]
    print(f"true pictures, period and angle unknown: texture {np.mean(loose):.3f}")
