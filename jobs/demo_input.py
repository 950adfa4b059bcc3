"""Writes the demo's input: photographs from scikit-image, painted images of five styles, and a manifest.

python jobs/demo_input.py build/demo-input
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

SIDE = 320  # pixels of a painted image
VARIANTS = 3  # images of each style
# Those that are part of the package; skimage.data would download others.
PHOTOGRAPHS = (
    "astronaut", "camera", "chelsea", "coffee", "coins", "horse", "immunohistochemistry", "page", "retina",
    "rocket",
)  # fmt: skip
SUNSET = ("2a1446", "7d2a63", "d8504f", "f79a4b", "ffe29a")
NIGHT = ("07123a", "123c7c", "2f6fb0", "7fb2cf", "f6e27a")
MEADOW = ("16351c", "2f6b2c", "74a53b", "c9d86a", "e9f3e0")
WAVES = ("062c3f", "0e5f75", "2c9aa0", "9fd6c8", "f7f4e6")
GLASS = ("1b1b3a", "a11d33", "e0a020", "1f7a5c", "3d5fc4", "e8e2d0")

# id -> query, contexts, prompt and settings. Each feature is in one row or in one group of rows.
Row = tuple[str, list[str], str | None, dict[str, Any]]
ROWS: list[Row] = [
    # a photograph in a painted style
    ("coffee", ["night-0"], None, {}),
    ("chelsea", ["sunset-0"], None, {}),
    ("rocket", ["waves-0"], None, {}),
    ("astronaut", ["glass-0"], None, {}),
    ("chelsea", ["waves-1"], "violet tones and wavy texture", {}),
    ("camera", ["sunset-1"], None, {}),
    ("coins", ["meadow-0"], None, {}),
    ("page", ["night-1"], None, {}),
    ("horse", ["meadow-1"], None, {}),
    # a photograph in the colours of another
    ("coffee", ["retina"], None, {}),
    ("astronaut", ["coffee"], None, {}),
    ("camera", ["immunohistochemistry"], None, {}),
    ("rocket", ["chelsea"], None, {}),
    ("retina", ["coffee"], None, {}),
    # three contexts of one style, and of different weights
    ("astronaut", ["waves-0", "waves-1", "waves-2"], None, {}),
    ("immunohistochemistry", ["sunset-0", "sunset-1", "sunset-2"], None, {}),
    ("coffee", ["meadow-0", "night-0", "sunset-0"], None, {"context_weights": [0.2, 0.2, 1.0]}),
    # a prompt beside the contexts, and the same prompt with more guidance by the contexts
    ("camera", ["retina"], "ocean colours", {"guidance_scale": 2.0}),
    ("camera", ["retina"], "ocean colours", {"guidance_scale": 1.5, "context_guidance_scale": 2.5}),
    ("horse", ["glass-1"], "autumn colours", {"guidance_scale": 2.0}),
    # one row with a setting in steps
    ("coffee", ["waves-2"], None, {"context_scale": 0.3, "seed": 7}),
    ("coffee", ["waves-2"], None, {"context_scale": 0.6, "seed": 7}),
    ("coffee", ["waves-2"], None, {"context_scale": 1.0, "seed": 7}),
    # other schedulers and steps
    ("chelsea", ["night-2"], None, {"scheduler": "euler", "num_inference_steps": 8}),
    ("rocket", ["sunset-2"], None, {"scheduler": "dpmpp_2m", "num_inference_steps": 6}),
    # fails: the manifest names a query that does not exist
    ("no-such-photograph", ["night-0"], None, {}),
]


def colours(stops: tuple[str, ...], tone: Field) -> Pixels:
    """Colour tones (H, W) of 0 to 1 by a palette from dark to light; uint8 (H, W, 3)."""
    levels = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in stops], np.float32)
    places = np.clip(tone, 0, 1) * (len(levels) - 1)
    channels = [np.interp(places, np.arange(len(levels)), levels[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def noise(rng: np.random.Generator, cells: int) -> Field:
    """Smooth noise (SIDE, SIDE), about -1 to 1."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), np.float32)


def paint(rng: np.random.Generator, image: Pixels, angles: Field, length: float) -> Pixels:
    """Paint an image again with brush strokes, from wide to fine. angles: of the strokes, radians (H, W)."""
    canvas = cv2.GaussianBlur(image, (0, 0), 6).astype(np.uint8)
    for width, count in ((9, 900), (5, 2200), (3, 3500)):
        for x, y in rng.integers(0, SIDE, (count, 2)).tolist():
            half = length * width / 2
            shift = np.array([np.cos(angles[y, x]), np.sin(angles[y, x])]) * half
            colour = np.clip(image[y, x] + rng.normal(0, 12, 3), 0, 255).tolist()
            start, end = (np.array([x, y]) + sign * shift for sign in (-1, 1))
            cv2.line(canvas, start.astype(int).tolist(), end.astype(int).tolist(), colour, width, cv2.LINE_AA)
    return canvas


def sunset(rng: np.random.Generator) -> Pixels:
    """A sun above the sea, in level strokes."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    sun_x, horizon = rng.uniform(0.25, 0.75), rng.uniform(0.5, 0.65)
    glow = np.exp(-np.hypot(x - sun_x, (y - horizon + 0.15) * 1.3) / 0.32)
    tone = np.where(y < horizon, 0.25 + 0.8 * glow, 0.1 + 0.75 * np.exp(-np.abs(x - sun_x) / 0.15))
    tone[(y > horizon + 0.2 + 0.05 * noise(rng, 6)[0]) & (x < 0.6)] = 0.02
    return paint(rng, colours(SUNSET, tone + 0.06 * noise(rng, 12)), 0.15 * noise(rng, 5), 2.5)


def night(rng: np.random.Generator) -> Pixels:
    """Stars, around which the strokes turn."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    stars = rng.uniform(0.08, 0.92, (9, 2)).astype(np.float32)
    apart = np.stack([np.hypot(x - star[0], y - star[1]) for star in stars])
    nearest = stars[apart.argmin(0)]
    angles = np.arctan2(y - nearest[..., 1], x - nearest[..., 0]) + np.pi / 2
    tone = 0.22 + 0.12 * noise(rng, 7) + 0.9 * np.exp(-((apart.min(0) / 0.075) ** 2))
    return paint(rng, colours(NIGHT, tone), angles.astype(np.float32), 2.0)


def meadow(rng: np.random.Generator) -> Pixels:
    """Grass in upright strokes, with flowers."""
    y = np.mgrid[:SIDE, :SIDE][0].astype(np.float32) / SIDE
    painted = paint(
        rng,
        colours(MEADOW, 0.75 - 0.7 * y + 0.16 * noise(rng, 16)),
        np.pi / 2 + 0.35 * noise(rng, 6),
        2.2,
    )
    for x, row in rng.integers(0, SIDE, (130, 2)).tolist():
        petal = [(214, 40, 57), (250, 200, 60), (250, 245, 240)][int(rng.integers(3))]
        cv2.circle(painted, (x, row), 2 + 5 * row // SIDE, petal, -1, cv2.LINE_AA)
    return painted


def waves(rng: np.random.Generator) -> Pixels:
    """Waves with foam, in strokes along them."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32) / SIDE
    phase = 2 * np.pi * (5 * y + 0.35 * np.sin(2 * np.pi * (1.5 * x + rng.random()))) + noise(rng, 4)
    slope = np.arctan(0.65 * np.cos(2 * np.pi * 1.5 * x)) * -1.0
    tone = 0.42 + 0.4 * np.sin(phase) + 0.12 * noise(rng, 10)
    return paint(rng, colours(WAVES, tone), slope.astype(np.float32), 2.8)


def glass(rng: np.random.Generator) -> Pixels:
    """Stained glass: cells of one colour between dark lines."""
    points = np.ones((SIDE, SIDE), np.uint8)
    points[tuple(rng.integers(0, SIDE, (2, 70)))] = 0
    _, cells = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    tones = rng.integers(1, len(GLASS), cells.max() + 1).astype(np.float32) / (len(GLASS) - 1)
    image = colours(GLASS, tones[cells] + np.float32(0))
    labels = cells.astype(np.float32)
    edge = np.hypot(cv2.Sobel(labels, cv2.CV_32F, 1, 0), cv2.Sobel(labels, cv2.CV_32F, 0, 1)) > 0
    image[cv2.dilate(edge.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0] = (20, 18, 28)
    return image


STYLES = {"sunset": sunset, "night": night, "meadow": meadow, "waves": waves, "glass": glass}


def write_images(folder: Path) -> set[str]:
    """Write the photographs and the painted images. Returns their names without ending."""
    images = {}
    for name in PHOTOGRAPHS:
        try:
            pixels = getattr(skimage.data, name)()
        except Exception as error:  # another release of scikit-image may lack it
            print(f"scikit-image has no {name} here: {error}", file=sys.stderr)
            continue
        images[name] = pixels if pixels.dtype == np.uint8 else (pixels * 255).astype(np.uint8)
    for number, (name, style) in enumerate(STYLES.items()):
        for variant in range(VARIANTS):
            images[f"{name}-{variant}"] = style(np.random.default_rng([2026, number, variant]))
    for name, pixels in images.items():
        Image.fromarray(pixels).convert("RGB").save(folder / f"{name}.jpg", quality=92)
    return set(images)


def main(target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_images(folder)
    rows = []
    for number, (query, contexts, prompt, settings) in enumerate(ROWS):
        if query in PHOTOGRAPHS and query not in written:
            query = "coffee"
        names = [name for name in contexts if name in written] or ["night-0"]
        row = {"query": f"{query}.jpg", "context": [f"{name}.jpg" for name in names], "prompt": prompt}
        rows.append({"id": f"demo-{number:02d}", **row, **settings})
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("query", pa.string()),
            ("context", pa.list_(pa.string())),
            ("prompt", pa.string()),
            ("num_inference_steps", pa.int32()),
            ("guidance_scale", pa.float64()),
            ("context_guidance_scale", pa.float64()),
            ("context_scale", pa.float64()),
            ("context_weights", pa.list_(pa.float64())),
            ("scheduler", pa.string()),
            ("seed", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "manifest.parquet")
    print(f"{len(rows)} rows in {folder / 'manifest.parquet'}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
