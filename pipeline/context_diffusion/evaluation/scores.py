"""Computes all scores of one image, by the names of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from context_diffusion.core.records import Pixels
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.leakage import colour_leakage, layout_leakage
from context_diffusion.evaluation.style import style_score

Scores = Mapping[str, Any]  # column -> value, None where it is undefined


def measure(
    column: str,
    image: Pixels,
    query: Pixels,
    contexts: list[Pixels],
    prompt: str | None,
    judge: str = "bundled",
    encoder: str = "bundled",
) -> float | None:
    """Return the score of a column; None if it is undefined.

    judge: see evaluation/prompt.py; encoder: see evaluation/similarity.py.
    """
    if column == "layout_score":
        return layout_score(image, query)
    if column == "style_score":
        return style_score(image, contexts)
    if column == "style_similarity":
        from context_diffusion.evaluation.similarity import style_similarity  # imports torch

        return style_similarity(image, contexts, encoder)
    if column == "layout_leakage":
        return layout_leakage(image, query, contexts)
    if column == "colour_leakage":
        return colour_leakage(image, query, contexts)
    if not prompt:
        return None
    from context_diffusion.evaluation.prompt import prompt_score  # imports torch

    return prompt_score(image, prompt, judge)


def worth(column: str, value: float) -> float:
    """Return a score, 0 to 1, so that higher is better: 1 - leakage for a leakage."""
    return 1 - value if column.endswith("_leakage") else value


def best_of(images: Sequence[Scores], columns: Sequence[str]) -> int:
    """Return the number of the image that `keep: best` keeps: that with the highest mean of its scores.

    A leakage counts as 1 - leakage. A score that is undefined for one of the images is ignored for all of
    them. The first of equal images is kept.
    """
    defined = [column for column in columns if all(image[column] is not None for image in images)]
    sums = [sum(worth(column, image[column]) for column in defined) for image in images]
    return sums.index(max(sums))


def is_flagged(image: Scores, thresholds: Mapping[str, float]) -> bool | None:
    """Return whether a score is worse than its threshold; None if no score with a threshold is defined."""
    defined = [(column, threshold) for column, threshold in thresholds.items() if image[column] is not None]
    if not defined:
        return None
    return any(worth(column, image[column]) < worth(column, threshold) for column, threshold in defined)
