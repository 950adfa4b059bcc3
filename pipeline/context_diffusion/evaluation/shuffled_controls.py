"""The control: for each pair a query, contexts and a prompt that are another row's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from context_diffusion.evaluation.pairs import Pair, source_key

# What the control takes from another row: the side that the score is about.
SWAPPED = {
    "layout_score": "query",
    "style_score": "contexts",
    "style_similarity": "contexts",
    "prompt_score": "prompt",
    "layout_leakage": "contexts",
    "colour_leakage": "query",
}


def others(pairs: Sequence[Pair]) -> list[dict[str, Pair | None]]:
    """For each pair and each side of it a row that has another one: the control. None where all are alike."""
    good = [pair for pair in pairs if not pair.error]
    chosen = {
        "query": _next_different(good, lambda pair: {source_key(pair.query)}),
        "contexts": _next_different(good, lambda pair: {source_key(source) for source in pair.contexts}),
        "prompt": _next_different([pair for pair in good if pair.prompt], lambda pair: {pair.prompt}),
    }
    return [{side: of.get((pair.id, pair.index)) for side, of in chosen.items()} for pair in pairs]


def _next_different(pairs: list[Pair], keys: Callable[[Pair], set[str | None]]) -> dict[tuple[str, int], Pair]:
    """By (id, index): the next pair, in a circle of those that differ, which shares none of its keys."""
    first = {frozenset(keys(pair)): pair for pair in reversed(pairs)}
    circle = list(reversed(first.items()))
    place = {key: number for number, (key, _) in enumerate(circle)}
    found = {}
    for pair in pairs:
        key = frozenset(keys(pair))
        turned = (circle[(place[key] + step) % len(circle)] for step in range(1, min(len(circle), 100)))
        other = next((candidate for theirs, candidate in turned if not theirs & key), None)
        if other:
            found[pair.id, pair.index] = other
    return found


def named_first(scores: NDArray[np.float64]) -> float:
    """The share of rows whose own candidate, on the diagonal, has the highest score. scores: (N, N) square."""
    return float((scores.argmax(1) == np.arange(len(scores))).mean())


def auc(true: ArrayLike, false: ArrayLike) -> float:
    """The chance that a true pair's score is above a false one's, ties by half (Mann and Whitney 1947); .5 by chance."""
    high, low = np.asarray(true, np.float64), np.sort(np.asarray(false, np.float64))
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))
