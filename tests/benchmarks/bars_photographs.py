"""Layout and style measures on images unlike the training data, and jobs/photographs.jpg.

    python tests/benchmarks/bars_photographs.py [MODEL] [--steps 20] [--page PNG]

Figures: thresholded noise and polygons in two colours, 16 queries in turn with 16 palettes, some of them
close. Photographs: 8 of scikit-image's as queries, dressed in 8 as contexts, 64 pairs: the edges should name
the query, the colours the context."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cv2
import numpy as np
import skimage.color
import skimage.data
from bars_rows import given_model, gray_request
from PIL import Image

from context_diffusion.core.records import Pixels
from context_diffusion.core.settings import Settings
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.style import chamfer, palette
from context_diffusion.inputs.decode import resize
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.samples import make
from support.measures import named_first

QUERIES = ["horse", "coffee", "chelsea", "rocket", "camera", "coins", "astronaut", "moon"]
CONTEXTS = [
    "retina",
    "hubble_deep_field",
    "chelsea",
    "coffee",
    "immunohistochemistry",
    "astronaut",
    "rocket",
    "grass",
]


def photograph(name: str, size: int) -> Pixels:
    pixels = getattr(skimage.data, name)()
    pixels = pixels if pixels.dtype == np.uint8 else (pixels * 255).astype(np.uint8)
    return resize(np.asarray(Image.fromarray(pixels).convert("RGB")), size, size, "crop")


def figure(rng: np.random.Generator, size: int, number: int) -> np.ndarray:
    """Where the figure is: bool (size, size). Noise over a threshold, or a few polygons of many corners."""
    if number % 2:
        noise = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), rng.uniform(3, 9))
        return noise > np.quantile(noise, rng.uniform(0.35, 0.65))
    canvas = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(2, 5))):
        corners = rng.uniform(0.1, 0.9, 2) * size + rng.normal(0, 0.17, (int(rng.integers(3, 9)), 2)) * size
        cv2.fillPoly(canvas, [corners.astype(np.int32)], 255)
    return canvas > 0


def two_colours(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """(2, 3) RGB in [0, 1] each: a dark and a light colour; every fourth palette is close to the one
    before."""
    palettes: list[np.ndarray] = []
    for number in range(count):
        lab = np.stack([rng.uniform([15, -45, -45], [45, 45, 45]), rng.uniform([60, -45, -45], [90, 45, 45])])
        if number % 4 == 3:
            before = skimage.color.rgb2lab(palettes[-1])
            lab = before + rng.normal(0, 1, (2, 3)) * 12
        palettes.append(np.clip(skimage.color.lab2rgb(lab), 0, 1))
    return palettes


def paint(inside: np.ndarray, colours: np.ndarray) -> Pixels:
    smooth = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 0.6)[..., None]
    return ((colours[0] * (1 - smooth) + colours[1] * smooth) * 255).astype(np.uint8)


def figures(model: NativeModel, settings: Settings, groups: int = 4) -> None:
    layouts, styles = [], []
    for group in range(groups):
        rng, size = np.random.default_rng((23, group)), model.image_size
        palettes = two_colours(rng, 16)
        queries = [paint(figure(rng, size, k), np.array([[0.25] * 3, [0.75] * 3])) for k in range(16)]
        contexts = [
            [paint(figure(rng, size, k + j), one) for j in range(2)] for k, one in enumerate(palettes)
        ]
        requests = [
            gray_request(f"{group}-{k}", queries[k], contexts[k], settings, 16 * group + k) for k in range(16)
        ]
        images = make(model, requests)
        layouts.append(
            named_first(np.array([[layout_score(image, query) for query in queries] for image in images]))
        )
        shown, made = [palette(one) for one in contexts], [palette([image]) for image in images]
        styles.append(named_first(np.array([[-chamfer(colours, one) for one in shown] for colours in made])))
    told = (
        f"edges name the query of 16 in {np.mean(layouts):.3f}, colours the palette in {np.mean(styles):.3f}"
    )
    print(f"figures, {16 * groups} rows: {told}", flush=True)


def photographs(model: NativeModel, settings: Settings, page: Path) -> None:
    size = model.image_size
    queries, contexts = ([photograph(name, size) for name in names] for names in (QUERIES, CONTEXTS))
    requests = [
        gray_request(f"{q}-{c}", queries[q], [contexts[c]], settings, 8 * q + c)
        for q in range(8)
        for c in range(8)
    ]
    images = make(model, requests)
    shown, made = [palette([one]) for one in contexts], [palette([image]) for image in images]
    layout = np.mean(
        [
            np.argmax([layout_score(image, query) for query in queries]) == n // 8
            for n, image in enumerate(images)
        ]
    )
    style = np.mean(
        [np.argmin([chamfer(colours, one) for one in shown]) == n % 8 for n, colours in enumerate(made)]
    )
    print(
        f"photographs, 64 pairs: edges name the query of 8 in {layout:.3f}, colours the context of 8 in "
        f"{style:.3f}"
    )
    gap = 6
    sheet = np.full((9 * (size + gap) - gap, 9 * (size + gap) - gap, 3), 255, np.uint8)
    cells = {(0, c + 1): one for c, one in enumerate(contexts)} | {
        (q + 1, 0): one for q, one in enumerate(queries)
    }
    cells |= {(n // 8 + 1, n % 8 + 1): image for n, image in enumerate(images)}
    for (row, column), pixels in cells.items():
        sheet[row * (size + gap) :, column * (size + gap) :][:size, :size] = pixels
    page.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(page, optimize=True, quality=90)  # a JPEG's; PNG has none
    print(page)


if __name__ == "__main__":
    given, model, settings = given_model(__doc__)
    figures(model, settings)
    photographs(model, settings, given.page)
