"""Held-out rows with their truth, for the bars: layouts, palette and texture pairs that training never sees.

In a group of GROUP rows the layouts differ, and so do the named palettes: an output has one right answer of GROUP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from context_diffusion.config import Settings
from context_diffusion.control import control_map
from context_diffusion.schema import Pixels, Request
from context_diffusion.training.data import make_query
from context_diffusion.training.layouts import Rng, Tone, make_layout
from context_diffusion.training.styles import Style, dress, make_style

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
    others = [dress(make_layout(rng, size, held_out=True)[1], style, rng) for _ in range(3)]
    return Row(tone, style, make_query(rng, tone), dress(tone, style, rng), others, int(rng.integers(1, 4)), family)


def request_of(row: Row, number: int, settings: Settings, **changes: object) -> Request:
    """The row as the engine takes it: its query's grey, its shown contexts, no prompt, a seed of its own."""
    plain = Request(
        id=f"row-{number}",
        index=0,
        query=row.query,
        control=control_map(row.query, "gray"),
        control_kind="gray",
        contexts=tuple(row.contexts[: row.shown]),
        prompt=None,
        negative_prompt=None,
        settings=settings.model_copy(update={"seed": number}),
    )
    changed = replace(plain, **changes)  # type: ignore[arg-type]
    if "query" in changes:
        changed = replace(changed, control=control_map(changed.query, "gray"))
    return changed


def regions(tone: Tone, count: int = 5) -> NDArray[np.int64]:
    """(H, W): the layout's regions, by tone."""
    return np.minimum((tone * count).astype(np.int64), count - 1)
