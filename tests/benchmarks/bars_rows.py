"""Held-out rows with their true images, for bars_*.py: layouts, palette and texture pairs that training never
sees. And what those scripts have in common.

In a group of GROUP rows the layouts differ, and so do the named palettes: an output has one right answer of
GROUP."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import skimage.color
import torch
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels, Request
from context_diffusion.core.settings import Settings
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.training.data.layouts import Rng, Tone, make_layout
from context_diffusion.training.data.pools import make_query
from context_diffusion.training.data.styles import Style, dress, make_style
from support.measures import named_first

GROUP = 8
SEED = 2**41


@dataclass(frozen=True)
class Row:
    """truth: `tone` in `style`; contexts: 3 other layouts in it, of which the first `shown` are shown."""

    tone: Tone
    style: Style
    query: Pixels
    truth: Pixels
    contexts: list[Pixels]
    context_tones: list[Tone]
    shown: int
    family: str


def held_out_rows(count: int, size: int = 128, seed: int = 0) -> list[Row]:
    rows: list[Row] = []
    for number in range(count):
        rng = np.random.default_rng((SEED, seed, number))
        rows.append(_row(rng, size, number, rows[number - number % GROUP :]))
    return rows


def _row(rng: Rng, size: int, number: int, group: list[Row]) -> Row:
    taken = {row.style.palette for row in group} - {"random"}
    style = make_style(rng, held_out=number % 2 == 0)
    while style.palette in taken:
        style = make_style(rng, held_out=number % 2 == 0)
    family, tone = make_layout(rng, size, held_out=True)
    tones, others = [], []
    for _ in range(3):
        tones.append(make_layout(rng, size, held_out=True)[1])
        others.append(dress(tones[-1], style, rng))
    return Row(
        tone,
        style,
        make_query(rng, tone),
        dress(tone, style, rng),
        others,
        tones,
        int(rng.integers(1, 4)),
        family,
    )


def gray_request(
    name: str, query: Pixels, contexts: Sequence[Pixels], settings: Settings, seed: int
) -> Request:
    """As the engine takes it: the query's grey as its control map, no prompt."""
    seeded = settings.model_copy(update={"seed": seed})
    return Request(name, 0, query, controls_of(query, ["gray"]), tuple(contexts), None, None, seeded)


def request_of(
    row: Row, number: int, settings: Settings, query: Pixels | None = None, **changes: object
) -> Request:
    """The row as the engine takes it: its own query or another one, its shown contexts, a seed of its own."""
    asked = row.query if query is None else query
    plain = gray_request(f"row-{number}", asked, row.contexts[: row.shown], settings, number)
    return replace(plain, **changes)  # type: ignore[arg-type]


def regions(tone: Tone, count: int = 5) -> NDArray[np.int64]:
    """(H, W): the layout's regions, by tone."""
    return np.minimum((tone * count).astype(np.int64), count - 1)


def region_distance(image: Pixels, truth: Pixels, tone: Tone) -> float:
    """Mean dE2000 between the mean colours of the layout's regions, by area."""
    made, true = (skimage.color.rgb2lab(one / 255) for one in (image, truth))
    areas, total = regions(tone), 0.0
    for area in np.unique(areas):
        inside = areas == area
        total += inside.mean() * float(
            skimage.color.deltaE_ciede2000(made[inside].mean(0), true[inside].mean(0))
        )
    return total


def named(score: Callable[[int, int], float], count: int, group: int = GROUP) -> float:
    """The share of rows whose own candidate is the best of its group. score: of output i and candidate j."""
    shares = []
    for start in range(0, count - group + 1, group):
        members = range(start, start + group)
        shares.append(named_first(np.array([[score(i, j) for j in members] for i in members])))
    return float(np.mean(shares))


def sign_test(better: int, worse: int) -> float:
    """One-sided p: as many or more better ones by chance."""
    n, better = int(better + worse), int(better)  # Python's own: numpy's overflow at 2**63
    return sum(math.comb(n, k) for k in range(better, n + 1)) / 2**n


def given_model(description: str | None) -> tuple[argparse.Namespace, NativeModel, Settings]:
    """The command line that the bars have in common."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", nargs="?", default="bundled")
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--guidance", type=float, default=1.5)
    arguments.add_argument("--noise-scale", type=float, help="of sampling; left out: the model's own")
    arguments.add_argument(
        "--rest-scale", type=float, help="of what the U-Net adds to a draft; left out: the model's own"
    )
    arguments.add_argument(
        "--detail-scale", type=float, help="of a draft's detail; left out: the model's own"
    )
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument(
        "--page", type=Path, default=Path("build/photographs.png"), help="of bars_photographs.py"
    )
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    model = NativeModel.from_pretrained(model_folder(given.model))
    for name in ("noise_scale", "rest_scale", "detail_scale"):
        if getattr(given, name) is not None:
            setattr(model, name, getattr(given, name))
    scales = f"noise {model.noise_scale:g}, rest {model.rest_scale:g}, detail {model.detail_scale:g}"
    print(f"{given.model}: {given.steps} steps, guidance {given.guidance:g}; scales: {scales}", flush=True)
    return given, model, Settings(num_inference_steps=given.steps, guidance_scale=given.guidance)
