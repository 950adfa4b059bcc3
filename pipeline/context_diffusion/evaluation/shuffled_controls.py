"""Shuffled controls: pairs whose query, contexts or prompt are another row's, and the AUC of a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from context_diffusion.evaluation.pairs import Pair, source_key

# The input that the shuffled control takes from another row: the one that the score compares with.
SWAPPED = {
    "layout_score": "query",
    "style_score": "contexts",
    "style_similarity": "contexts",
    "prompt_score": "prompt",
    "layout_leakage": "contexts",
    "colour_leakage": "query",
}


def others(pairs: Sequence[Pair]) -> list[dict[str, Pair | None]]:
    """Return for each pair and input the shuffled control, a pair that differs; None if all are equal."""
    valid = [pair for pair in pairs if not pair.error]
    with_prompt = [pair for pair in valid if pair.prompt]
    by_input = {
        "query": _next_different(valid, lambda pair: {source_key(pair.query)}),
        "contexts": _next_different(valid, lambda pair: {source_key(source) for source in pair.contexts}),
        "prompt": _next_different(with_prompt, lambda pair: {pair.prompt}),
    }
    return [
        {name: partners.get((pair.id, pair.index)) for name, partners in by_input.items()} for pair in pairs
    ]


def _next_different(
    pairs: list[Pair], keys: Callable[[Pair], set[str | None]]
) -> dict[tuple[str, int], Pair]:
    """Return for each pair, by (id, index), the next one that shares none of its keys, in a circle."""
    first_by_keys = {frozenset(keys(pair)): pair for pair in reversed(pairs)}
    ring = list(reversed(first_by_keys.items()))
    position = {pair_keys: number for number, (pair_keys, _) in enumerate(ring)}
    partners = {}
    for pair in pairs:
        pair_keys = frozenset(keys(pair))
        steps = range(1, min(len(ring), 100))
        candidates = (ring[(position[pair_keys] + step) % len(ring)] for step in steps)
        partner = next((other for other_keys, other in candidates if not other_keys & pair_keys), None)
        if partner:
            partners[pair.id, pair.index] = partner
    return partners


def auc(true: ArrayLike, false: ArrayLike) -> float:
    """Return the chance that a true pair scores higher than a false one (Mann and Whitney 1947).

    Ties count half.

    0.5: the score cannot distinguish them.
    """
    true_scores = np.asarray(true, np.float64)
    false_scores = np.sort(np.asarray(false, np.float64))
    twice_below = np.searchsorted(false_scores, true_scores, "left") + np.searchsorted(
        false_scores, true_scores, "right"
    )
    return float(twice_below.mean() / (2 * len(false_scores)))
