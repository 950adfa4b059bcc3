"""Rows of held-out generator data, with the truth: what the scores are validated on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from context_diffusion.core.records import Pixels
from context_diffusion.training.data.pools import VALIDATION_SEED, make_pool
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS
from context_diffusion.training.data.styles import Style


@dataclass(frozen=True)
class HeldOut:
    """truth: the picture with the query's layout in the contexts' style."""

    truth: Pixels
    query: Pixels
    contexts: list[Pixels]
    style: Style
    layout: int


@cache
def held_out_rows(count: int = 64) -> list[HeldOut]:
    """Layouts and styles that training never sees; 1 or 2 contexts on other layouts."""
    pool, rows = make_pool(VALIDATION_SEED + 501, count, 3, held_out=True), []
    for s, style in enumerate(pool.styles):
        truth, *contexts = pool.targets[3 * s : 3 * s + 3]
        layout = int(pool.layout_of[3 * s])
        rows.append(HeldOut(truth, pool.queries[2 * layout + s % 2], contexts[: 1 + s % 2], style, layout))
    return rows


def prompt_of(rng: np.random.Generator, style: Style) -> str:
    """Palette and texture in a wording that training never uses."""
    return f"{rng.choice(TEXTURE_WORDS[style.texture])} texture in {rng.choice(PALETTE_WORDS[style.palette])}"


def recoloured(image: Pixels, source: Pixels) -> Pixels:
    """A picture in another one's colours, dark for dark and light for light."""
    by_tone = [np.argsort(one.astype(int).sum(2).ravel(), kind="stable") for one in (image, source)]
    made = np.empty_like(image).reshape(-1, 3)
    made[by_tone[0]] = source.reshape(-1, 3)[by_tone[1]]
    return made.reshape(image.shape)
