"""The bundled model's bars on held-out rows, with negative controls and the autoencoder's copy of the truth as ceiling.

    python tests/benchmarks/bars_judge.py build/bars-judge.pt                 (once: the judge of textures and palettes)
    python tests/benchmarks/bars.py [MODEL] [--rows 256] [--steps 20] [--part layout --part prompt ...]

Parts: layout (layout, style, texture), contexts, swap, prompt; bars_photographs.py has the pictures that the generator
cannot make. Every row has a seed of its own, 1 to 3 contexts, and a query in grey or in another style.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import bars_judge
import numpy as np
import skimage.color
import torch
from bars_rows import GROUP, Row, held_out_rows, regions, request_of
from numpy.typing import NDArray

from context_diffusion.config import Settings
from context_diffusion.evaluation.layout import boundary_f1, layout_score
from context_diffusion.evaluation.ranking import named_first
from context_diffusion.evaluation.style import chamfer, palette
from context_diffusion.model.native import NativeModel
from context_diffusion.model.source import model_folder
from context_diffusion.schema import Pixels
from context_diffusion.training.prompts import PALETTE_WORDS, TEXTURE_WORDS
from context_diffusion.training.samples import make
from context_diffusion.training.styles import HELD_OUT, Style, dress, vary

SETTINGS = Settings(guidance_scale=1.5)


def named(score: Callable[[int, int], float], count: int, group: int = GROUP) -> float:
    """The share of rows whose own candidate is the best of its group. score: of output i and candidate j."""
    starts = range(0, count - group + 1, group)
    return float(np.mean([named_first(np.array([[score(s + i, s + j) for j in range(group)] for i in range(group)])) for s in starts]))


def region_distance(image: Pixels, truth: Pixels, areas: NDArray[np.int64]) -> float:
    """Mean dE2000 between the mean colours of the regions, by area."""
    made, true = (skimage.color.rgb2lab(one / 255) for one in (image, truth))
    total = 0.0
    for area in np.unique(areas):
        inside = areas == area
        total += inside.mean() * float(skimage.color.deltaE_ciede2000(made[inside].mean(0), true[inside].mean(0)))
    return total


def sign_test(better: int, worse: int) -> float:
    """One-sided p: as many or more better ones by chance."""
    n = better + worse
    return sum(math.comb(n, k) for k in range(better, n + 1)) / 2**n


def layout_part(model: NativeModel, rows: list[Row], settings: Settings, network: bars_judge.Judge) -> None:
    requests = [request_of(row, i, settings) for i, row in enumerate(rows)]
    blank = np.full_like(rows[0].query, 128)
    truth = [row.truth for row in rows]
    made = {
        "model": make(model, requests),
        "blank context": make(model, [request_of(r, i, settings, contexts=(blank,)) for i, r in enumerate(rows[: len(rows) // 4])]),
        "autoencoder": copies(model, truth),
        "truth": truth,
    }
    made["shuffled query"] = made["shuffled context"] = made["model"]
    contexts = [palette(row.contexts[: row.shown]) for row in rows]
    areas = [regions(row.tone) for row in rows]
    print(f"{'':18s} layout  boundary  palette  regions dE2000  texture  named palette")
    for name, images in made.items():
        count = len(images) - len(images) % GROUP
        # A shuffled row is compared with what its neighbour should be.
        q, c = (1 if name == "shuffled query" else 0), (1 if name == "shuffled context" else 0)
        other = [i - i % GROUP + (i + 1) % GROUP for i in range(count)]
        of_query, of_context = (other if q else list(range(count))), (other if c else list(range(count)))
        queries = [rows[i].query for i in of_query]
        colours, told = [palette([image]) for image in images], bars_judge.judge(network, images)
        layout = named(lambda i, j, images=images, queries=queries: layout_score(images[i], queries[j]), count)
        style = named(lambda i, j, colours=colours, t=of_context: -chamfer(colours[i], contexts[t[j]]), count)
        boundary = np.mean([boundary_f1(images[i], truth[of_query[i]]) for i in range(count)])
        targets = [dress(rows[of_query[i]].tone, rows[of_context[i]].style, np.random.default_rng(i)) if q or c else truth[i] for i in range(count)]
        distance = np.mean([region_distance(images[i], targets[i], areas[of_query[i]]) for i in range(count)])
        texture = np.mean([told[0][i] == rows[of_context[i]].style.texture for i in range(count)])
        right = [told[1][i] == rows[of_context[i]].style.palette for i in range(count) if rows[of_context[i]].style.palette != "random"]
        print(f"{name:18s} {layout:6.3f}  {boundary:8.3f}  {style:7.3f}  {distance:14.1f}  {texture:7.3f}  {np.mean(right):.3f}", flush=True)


@torch.no_grad()
def copies(model: NativeModel, images: list[Pixels]) -> list[Pixels]:
    """What the autoencoder makes of them."""
    latents = (model.encode_pixels(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]) for image in images)
    return [(model.decode(z)[0] * 255).round().byte().permute(1, 2, 0).numpy() for z in latents]


def contexts_part(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    one, three, turned = (
        make(model, [request_of(row, i, settings, contexts=tuple(pick(row.contexts))) for i, row in enumerate(rows)])
        for pick in (lambda c: c[:1], lambda c: c, lambda c: c[::-1])
    )
    areas = [regions(row.tone) for row in rows]
    far = [[region_distance(image, row.truth, area) for image, row, area in zip(images, rows, areas, strict=True)] for images in (one, three)]
    better = sum(b < a for a, b in zip(*far, strict=True))
    same = all(np.array_equal(a, b) for a, b in zip(three, turned, strict=True))
    print(f"one context {np.mean(far[0]):.2f}, three {np.mean(far[1]):.2f} dE2000: three are better in {better} of {len(rows)}, p {sign_test(better, len(rows) - better):.1e}")
    print(f"three contexts in another order: {'equal bits' if same else 'OTHER BITS'}")


def swap_part(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    """Of pairs of rows: the output with only the context, only the query exchanged for the other row's. Same seed."""
    pairs = [(rows[i], rows[i + 1], i) for i in range(0, len(rows) - 1, 2)]
    base = make(model, [request_of(a, i, settings) for a, _, i in pairs])
    other_context = make(model, [request_of(a, i, settings, contexts=tuple(b.contexts[: b.shown])) for a, b, i in pairs])
    other_query = make(model, [request_of(a, i, settings, query=b.query) for a, b, i in pairs])
    edges = [np.mean([1 - layout_score(a, b) for a, b in zip(base, images, strict=True)]) for images in (other_context, other_query)]
    colours = [np.mean([chamfer(palette([a]), palette([b])) for a, b in zip(base, images, strict=True)]) for images in (other_context, other_query)]
    print(f"edges change by {edges[0]:.3f} with the context, {edges[1]:.3f} with the query: ratio {edges[0] / edges[1]:.3f}")
    print(f"palettes change by {colours[1]:.2f} with the query, {colours[0]:.2f} with the context: ratio {colours[1] / colours[0]:.3f}")


def prompt_part(model: NativeModel, rows: list[Row], settings: Settings, network: bars_judge.Judge) -> None:
    """Without a context: palette and texture as named. With contexts of another value: the named one, the rest kept."""
    styled = [row for row in rows if row.style.palette != "random"]
    asked = []
    for number, row in enumerate(styled):
        rng = np.random.default_rng((13, number))
        prompt = f"{rng.choice(TEXTURE_WORDS[row.style.texture])} texture in {rng.choice(PALETTE_WORDS[row.style.palette])}"
        asked.append(request_of(row, number, settings, contexts=(), prompt=prompt))
    told = bars_judge.judge(network, make(model, asked))
    right = [np.mean([t == getattr(row.style, what) for t, row in zip(names, styled, strict=True)]) for names, what in zip(told, ("texture", "palette"), strict=True)]
    print(f"prompt alone, {len(styled)} rows: texture {right[0]:.3f}, palette {right[1]:.3f}")
    for scale, context_scale in ((settings.guidance_scale, settings.guidance_scale), (3.0, 1.0), (1.0, 3.0)):
        weights = settings.model_copy(update={"guidance_scale": scale, "context_guidance_scale": context_scale})
        won = {"texture": [], "palette": []}
        far = []
        requests, wanted = [], []
        for number, row in enumerate(rows):
            what, style = variant(np.random.default_rng((17, number)), row.style)
            words = PALETTE_WORDS if what == "palette" else TEXTURE_WORDS
            word = str(np.random.default_rng((18, number)).choice(words[getattr(style, what)]))
            prompt = f"a {word} picture" if what == "palette" else f"{word} texture"
            requests.append(request_of(row, number, weights, prompt=prompt))
            wanted.append((what, style))
        images = make(model, requests)
        textures, palettes = bars_judge.judge(network, images)
        for row, image, (what, style), texture, colour in zip(rows, images, wanted, textures, palettes, strict=True):
            won[what].append((texture if what == "texture" else colour) == getattr(style, what))
            far.append(region_distance(image, dress(row.tone, style, np.random.default_rng(1)), regions(row.tone)))
        print(
            f"override, prompt {scale:g} against contexts {context_scale:g}: texture {np.mean(won['texture']):.3f}, "
            f"palette {np.mean(won['palette']):.3f}, dE2000 to the variant {np.mean(far):.1f}",
            flush=True,
        )


def variant(rng: np.random.Generator, style: Style) -> tuple[str, Style]:
    """Another palette or texture, that is not a held-out pair's."""
    while True:
        what, other = vary(rng, style)
        if (other.palette, other.texture) not in HELD_OUT:
            return what, other


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default="bundled")
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--guidance", type=float, default=1.5)
    arguments.add_argument("--noise-scale", type=float, help="of sampling; left out: the model's own")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--judge", type=Path, default=Path("build/bars-judge.pt"))
    arguments.add_argument("--part", action="append", choices=("layout", "contexts", "swap", "prompt"))
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    model = NativeModel.from_pretrained(model_folder(given.model))
    model.noise_scale = given.noise_scale or model.noise_scale
    rows, settings = held_out_rows(given.rows, model.image_size), SETTINGS.model_copy(update={"num_inference_steps": given.steps, "guidance_scale": given.guidance})
    network = bars_judge.load(given.judge)
    parts = given.part or ["layout", "contexts", "swap", "prompt"]
    print(f"{given.model}: {given.rows} rows, {given.steps} steps, guidance {given.guidance:g}, noise scale {model.noise_scale:g}")
    if "layout" in parts:
        layout_part(model, rows, settings, network)
    if "contexts" in parts:
        contexts_part(model, rows, settings)
    if "swap" in parts:
        swap_part(model, rows, settings)
    if "prompt" in parts:
        prompt_part(model, rows, settings, network)


if __name__ == "__main__":
    main()
