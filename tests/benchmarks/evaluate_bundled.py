"""The bars of the bundled model on held-out data, with shuffled controls; and a page of photographs to look at.

python tests/benchmarks/evaluate_bundled.py [MODEL] [--rows 64] [--steps 20] [--noise-scale .75]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from context_diffusion.config import Settings
from context_diffusion.evaluation.layout import boundary_f1, layout_score
from context_diffusion.evaluation.ranking import named_first
from context_diffusion.evaluation.style import chamfer, palette
from context_diffusion.model.native import NativeModel
from context_diffusion.model.source import model_folder
from context_diffusion.schema import Pixels
from context_diffusion.training.data import VALIDATION_SEED, make_pool
from context_diffusion.training.samples import make, pool_requests

CANDIDATES = 8


def named(scores: np.ndarray) -> float:
    """The share of rows named first among CANDIDATES: rows are compared within groups of that many."""
    groups = [scores[i : i + CANDIDATES, i : i + CANDIDATES] for i in range(0, len(scores), CANDIDATES)]
    return float(np.mean([named_first(group) for group in groups]))


def layout_matrix(images: list[Pixels], queries: list[Pixels]) -> np.ndarray:
    return np.array([[layout_score(image, query) for query in queries] for image in images])


def palette_matrix(images: list[Pixels], contexts: list[list[Pixels]]) -> np.ndarray:
    made, shown = [palette([image]) for image in images], [palette(list(group)) for group in contexts]
    return -np.array([[chamfer(one, other) for other in shown] for one in made])


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model", nargs="?", default="bundled")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--noise-scale", type=float, help="of sampling; left out: the model's own")
    arguments.add_argument("--page", default="build/evaluation.png")
    given = arguments.parse_args()
    torch.set_num_threads(2)
    model = NativeModel.from_pretrained(model_folder(given.model))
    model.noise_scale = given.noise_scale or model.noise_scale
    pool = make_pool(VALIDATION_SEED + 77, 64, 8, model.image_size, held_out=True)
    settings = Settings(num_inference_steps=given.steps, guidance_scale=1.5)
    requests, targets = pool_requests(pool, given.rows, settings, prompts=False)
    images = make(model, requests)
    queries, contexts = [one.query for one in requests], [list(one.contexts) for one in requests]
    truth = [pool.targets[index] for index in targets]
    latents = [model.encode_pixels(torch.from_numpy(t.copy()).permute(2, 0, 1)[None]) for t in truth]
    ceiling = [(model.decode(z)[0] * 255).byte().permute(1, 2, 0).numpy() for z in latents]
    shuffled = [*images[1:], images[0]]
    print(f"{given.rows} rows, of {CANDIDATES}: layout named, palette named")
    for name, pictures in (("model", images), ("truth", truth), ("autoencoder", ceiling), ("shuffled", shuffled)):
        layout, style = named(layout_matrix(pictures, queries)), named(palette_matrix(pictures, contexts))
        distance = np.mean([chamfer(palette([a]), palette([b])) for a, b in zip(pictures, truth, strict=True)])
        boundary = np.mean([boundary_f1(a, b) for a, b in zip(pictures, truth, strict=True)])
        print(f"  {name:12s} {layout:.3f}  {style:.3f}  to the truth: palette {distance:.1f} Lab, boundary F1 {boundary:.3f}")
    rows = []
    for one, image, true in list(zip(requests, images, truth, strict=True))[:12]:
        shown = (*one.contexts, np.full_like(image, 128), np.full_like(image, 128))[:3]
        rows.append(np.concatenate([one.query, *shown, true, image], 1))
    Path(given.page).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(rows[:6]), np.concatenate(rows[6:])], 1)).save(given.page)
    print(given.page)


if __name__ == "__main__":
    main()
