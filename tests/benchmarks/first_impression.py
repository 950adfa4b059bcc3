"""Measures what a first user sees: 19 queries in the style of 6 contexts, images unlike the training data.

    python tests/benchmarks/first_impression.py [--size 128] [--draft-only] [--page PNG] [--settings JSON]
    [--every 1]

One thread, `model(query, [context])` for one image, by the product's own loader. The last line is a JSON
object:

palette        mean Lab distance in the optimal assignment of 400 pixels of image and context, both blurred by
a pixel f1, recall     of the Canny edges of the contrast-stretched lightness against the query's: F1 at 2 px;
the share of the
               query's edges kept at 1.5 px
texture        chi-square distance of the LBP histograms of image and context, radii 1, 2 and 4
query_named    share of images whose blurred Sobel edges correlate best with their own query's, of 19
context_named  share of images whose Lab histogram is nearest to their own context's, of 6
cpu_s          processor seconds an image

Queries are photographs that scikit-image ships and drawn images: text, lines, icons, a night, a very dark and
a very bright image, a painting. `--every N` measures each Nth pair."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from bars_photographs import photograph
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from skimage.color import rgb2lab
from skimage.feature import local_binary_pattern

from context_diffusion.core.records import Pixels
from context_diffusion.pipeline import ContextDiffusion

DRAWN = 512  # pixels a side of drawn images
PHOTOGRAPHS = [
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "horse",
    "moon",
    "rocket",
    "clock",
    "page",
    "text",
]
CONTEXT_PHOTOGRAPHS = ["retina", "hubble_deep_field", "immunohistochemistry", "brick"]
PIXELS = 400  # that the palette assigns
REACH, KEPT = 2.0, 1.5  # pixels between an edge and its match, for F1 and for recall


def text() -> Pixels:
    image = np.full((DRAWN, DRAWN, 3), 255, np.uint8)
    for row, word in enumerate(["CONTEXT", "diffusion", "128 px", "ABC xyz"]):
        cv2.putText(
            image, word, (20, 105 + 115 * row), cv2.FONT_HERSHEY_SIMPLEX, 3.0, (0, 0, 0), 13, cv2.LINE_AA
        )
    return image


def lines() -> Pixels:
    """A house, a tree and the sun in black lines on white."""
    image = np.full((DRAWN, DRAWN, 3), 255, np.uint8)
    paths = [[(60, 440), (60, 250), (160, 150), (260, 250), (260, 440), (60, 440)], [(60, 250), (260, 250)]]
    paths += [
        [(130, 440), (130, 330), (190, 330), (190, 440)],
        [(380, 440), (380, 280)],
        [(20, 440), (490, 440)],
    ]
    for path in paths:
        cv2.polylines(image, [np.array(path, np.int32)], False, (0, 0, 0), 8, cv2.LINE_AA)
    cv2.circle(image, (380, 220), 75, (0, 0, 0), 8, cv2.LINE_AA)
    cv2.circle(image, (260, 80), 40, (0, 0, 0), 8, cv2.LINE_AA)
    return image


def icons() -> Pixels:
    """Four flat figures in clear colours on light grey."""
    image = np.full((DRAWN, DRAWN, 3), 235, np.uint8)
    cv2.circle(image, (130, 130), 90, (220, 60, 50), -1, cv2.LINE_AA)
    cv2.rectangle(image, (300, 50), (460, 210), (50, 110, 210), -1)
    cv2.fillPoly(image, [np.array([(130, 290), (230, 460), (30, 460)], np.int32)], (60, 160, 80), cv2.LINE_AA)
    cv2.ellipse(image, (380, 380), (95, 60), 30, 0, 360, (240, 190, 40), -1, cv2.LINE_AA)
    cv2.circle(image, (380, 380), 25, (40, 40, 40), -1, cv2.LINE_AA)
    return image


def night() -> Pixels:
    """A dark town with lit windows and a moon."""
    rng = np.random.default_rng(1)
    image = np.linspace((8, 10, 30), (30, 25, 55), DRAWN)[:, None].repeat(DRAWN, 1).astype(np.uint8)
    cv2.circle(image, (400, 90), 45, (235, 230, 200), -1, cv2.LINE_AA)
    for left in range(10, DRAWN - 60, 84):
        top = int(rng.integers(150, 360))
        cv2.rectangle(image, (left, top), (left + 70, DRAWN), (14, 14, 20), -1)
        for x, y in [
            (x, y)
            for x in (left + 12, left + 42)
            for y in range(top + 18, DRAWN - 30, 44)
            if rng.random() < 0.6
        ]:
            cv2.rectangle(image, (x, y), (x + 16, y + 22), (250, 200, 90), -1)
    return image


def exposed(image: Pixels, stops: float) -> Pixels:
    """The image with `stops` more of linear light."""
    return np.clip(((image / 255) ** 2.2 * 2**stops) ** (1 / 2.2) * 255, 0, 255).astype(np.uint8)


def painted(seed: int, hues: list[tuple[int, int, int]], from_image: Pixels | None = None) -> Pixels:
    """Brush strokes: those of an image's own colours, or of several hues of about one lightness."""
    rng = np.random.default_rng(seed)
    image = np.full((DRAWN, DRAWN, 3), hues[0], np.uint8)
    for number in range(4000):
        x, y = rng.integers(0, DRAWN, 2)
        colour = np.array(
            hues[int(len(hues) * ((x + 2 * y) / (3 * DRAWN) + rng.normal(0, 0.2))) % len(hues)], float
        )
        if from_image is not None:
            colour = from_image[y, x].astype(float)
        angle, length = rng.normal(0.6, 0.5) + x / DRAWN, (34 - 22 * number / 4000) * np.array([1.0, 0.3])
        colour = np.clip(colour + rng.normal(0, 14), 0, 255).tolist()
        cv2.ellipse(
            image,
            (int(x), int(y)),
            length.astype(int).tolist(),
            np.degrees(angle),
            0,
            360,
            colour,
            -1,
            cv2.LINE_AA,
        )
    return image


def inputs(size: int) -> tuple[dict[str, Pixels], dict[str, Pixels]]:
    """Queries and contexts by name, (size, size, 3) and as large as they come."""
    motorcycle = skimage.data.stereo_motorcycle()[0]
    large = {name: photograph(name, DRAWN) for name in PHOTOGRAPHS}
    large["motorcycle"] = np.asarray(Image.fromarray(motorcycle[:, 120:620]).resize((DRAWN, DRAWN), 3))
    painting = painted(3, [(120, 120, 120)], large["motorcycle"][:, ::-1][:DRAWN])
    large |= {
        "painting": painting,
        "drawn text": text(),
        "lines": lines(),
        "icons": icons(),
        "night": night(),
    }
    large |= {
        "very dark": exposed(large["rocket"][:, ::-1], -4),
        "very bright": exposed(large["chelsea"][::-1], 2),
    }
    queries = {
        name: np.asarray(Image.fromarray(image).resize((size, size), 3)) for name, image in large.items()
    }
    contexts = {name: photograph(name, DRAWN) for name in CONTEXT_PHOTOGRAPHS}
    contexts["strokes"] = painted(
        5, [(200, 90, 80), (70, 140, 90), (80, 110, 200), (190, 150, 60), (150, 80, 160)]
    )
    contexts["sunset"] = painted(
        7, [(40, 40, 90), (120, 50, 100), (220, 110, 60), (250, 200, 110), (30, 60, 70)]
    )
    return queries, contexts


def lab(image: Pixels) -> np.ndarray:
    return rgb2lab(cv2.GaussianBlur(image, (0, 0), 1.0))


def palette_distance(image: Pixels, context: Pixels) -> float:
    chosen = np.random.default_rng(0).permutation(image.shape[0] * image.shape[1])[:PIXELS]
    first, second = (lab(pixels).reshape(-1, 3)[chosen] for pixels in (image, context))
    distances = np.linalg.norm(first[:, None] - second[None], axis=2)
    return float(distances[linear_sum_assignment(distances)].mean())


def lightness(image: Pixels) -> np.ndarray:
    """uint8 lightness, stretched from its 1st to its 99th percentile."""
    light = rgb2lab(image)[..., 0]
    low, high = np.percentile(light, (1, 99))
    return (np.clip((light - low) / max(high - low, 1e-3), 0, 1) * 255).astype(np.uint8)


def edge_scores(image: Pixels, query: Pixels) -> tuple[float, float]:
    """F1 and recall."""
    edges, wanted = (
        cv2.Canny(cv2.GaussianBlur(lightness(pixels), (0, 0), 1.0), 50, 120) > 0 for pixels in (image, query)
    )
    if not (edges.any() and wanted.any()):
        return 0.0, 0.0
    to_wanted, to_edges = distance_transform_edt(~wanted)[edges], distance_transform_edt(~edges)[wanted]
    precision, recall = (to_wanted <= REACH).mean(), (to_edges <= REACH).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-9)), float((to_edges <= KEPT).mean())


def texture_distance(image: Pixels, context: Pixels) -> float:
    distances = []
    for radius in (1, 2, 4):
        first, second = texture_histogram(image, radius), texture_histogram(context, radius)
        distances.append(((first - second) ** 2 / np.maximum(first + second, 1e-9)).sum())
    return float(np.mean(distances))


def texture_histogram(image: Pixels, radius: int) -> NDArray[np.float64]:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    patterns = local_binary_pattern(gray, 8, radius, "uniform").astype(int).ravel()
    return np.bincount(patterns, minlength=10) / len(patterns)


def sobel(image: Pixels) -> np.ndarray:
    light = lightness(image).astype(np.float32) / 255
    edges = cv2.GaussianBlur(np.hypot(cv2.Sobel(light, -1, 1, 0), cv2.Sobel(light, -1, 0, 1)), (0, 0), 1.5)
    return (edges - edges.mean()) / max(edges.std(), 1e-6)


def histogram(image: Pixels) -> np.ndarray:
    counts, _ = np.histogramdd(lab(image).reshape(-1, 3), (8, 12, 12), ((0, 100), (-90, 90), (-90, 90)))
    return cv2.GaussianBlur((counts / counts.sum()).reshape(8, 144), (0, 0), 0.5).ravel()


def measure(
    make: Callable[[Pixels, Pixels], Pixels], size: int, every: int, page: Path | None
) -> dict[str, float]:
    queries, contexts = inputs(size)
    shown = {
        name: np.asarray(Image.fromarray(image).resize((size, size), 3)) for name, image in contexts.items()
    }
    query_edges = {name: sobel(image) for name, image in queries.items()}
    context_histograms = {name: histogram(image) for name, image in shown.items()}
    pairs = [(query, context) for query in queries for context in contexts][::every]
    rows, images = [], {}
    for query, context in pairs:
        began = time.process_time()
        image = make(queries[query], contexts[context])
        seconds = time.process_time() - began
        f1, recall = edge_scores(image, queries[query])
        edges, colours = sobel(image), histogram(image)
        named = max(query_edges, key=lambda name: float((query_edges[name] * edges).mean())) == query
        styled = (
            min(context_histograms, key=lambda name: float(np.abs(context_histograms[name] - colours).sum()))
            == context
        )
        palette, texture = palette_distance(image, shown[context]), texture_distance(image, shown[context])
        rows.append([palette, f1, recall, texture, named, styled, seconds])
        images[query, context] = image
    if page:
        draw_page(queries, shown, images, page)
    names = ["palette", "f1", "recall", "texture", "query_named", "context_named", "cpu_s"]
    return dict(zip(names, np.mean(rows, axis=0).round(4).tolist(), strict=True)) | {
        "pairs": len(pairs),
        "size": size,
    }


def draw_page(
    queries: dict[str, Pixels], contexts: dict[str, Pixels], images: dict[tuple[str, str], Pixels], page: Path
) -> None:
    size, gap = len(next(iter(queries.values()))), 4
    sheet = np.full(((len(queries) + 1) * (size + gap), (len(contexts) + 1) * (size + gap), 3), 255, np.uint8)
    cells = {(0, column + 1): image for column, image in enumerate(contexts.values())}
    cells |= {(row + 1, 0): image for row, image in enumerate(queries.values())}
    cells |= {
        (list(queries).index(q) + 1, list(contexts).index(c) + 1): image for (q, c), image in images.items()
    }
    for (row, column), image in cells.items():
        sheet[row * (size + gap) :, column * (size + gap) :][:size, :size] = image
    page.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(page)


def maker(
    model: ContextDiffusion, size: int, draft_only: bool, settings: dict[str, object]
) -> Callable[[Pixels, Pixels], Pixels]:
    """Return what makes one image of a query and a context."""
    asked = {"width": size, "height": size, "seed": 0} | settings

    def draft(query: Pixels, context: Pixels) -> Pixels:
        with torch.inference_mode():
            [request] = model.requests(query, [context], None, None, None, "crop", asked)
            return model.backbone.draft_image(request)  # type: ignore[attr-defined]

    return draft if draft_only else lambda query, context: np.asarray(model(query, [context], **asked))


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--size", type=int, default=128)
    arguments.add_argument("--draft-only", action="store_true", help="the draft without the diffusion model")
    arguments.add_argument("--page", type=Path, help="where a contact sheet is drawn")
    arguments.add_argument(
        "--settings", type=json.loads, default={}, help='row settings, {"num_inference_steps": 4}'
    )
    arguments.add_argument("--every", type=int, default=1)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    model = ContextDiffusion.from_pretrained(device="cpu", cpu_threads=1)
    figures = measure(
        maker(model, given.size, given.draft_only, given.settings), given.size, given.every, given.page
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
