"""All scores of one picture, by the names that jobs and columns use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from context_diffusion.core.records import Pixels
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.leakage import colour_leakage, layout_leakage
from context_diffusion.evaluation.style import style_score

Scores = Mapping[str, Any]  # column -> value, None where it could not be told


def measure(
    column: str,
    image: Pixels,
    query: Pixels,
    contexts: list[Pixels],
    prompt: str | None,
    judge: str = "bundled",
    encoder: str = "bundled",
) -> float | None:
    """The score of that column; None where there is nothing to compare with. judge: see evaluation/prompt.py; encoder: see
    evaluation/similarity.py."""
    if column == "layout_score":
        return layout_score(image, query)
    if column == "style_score":
        return style_score(image, contexts)
    if column == "style_similarity":
        from context_diffusion.evaluation.similarity import style_similarity  # torch

        return style_similarity(image, contexts, encoder)
    if column == "layout_leakage":
        return layout_leakage(image, query, contexts)
    if column == "colour_leakage":
        return colour_leakage(image, query, contexts)
    if not prompt:
        return None
    from context_diffusion.evaluation.prompt import prompt_score  # torch

    return prompt_score(image, prompt, judge)


def worth(column: str, value: float) -> float:
    """A score, 0 to 1, so that more is better: of a leakage the rest."""
    return 1 - value if column.endswith("_leakage") else value


def best_of(images: Sequence[Scores], columns: Sequence[str]) -> int:
    """Which of a row's images `keep: best` keeps: that with the highest mean of its scores, each 0 to 1, a leakage as
    1 - leakage. A score that one of them lacks counts for none of them; of equal images the first is kept."""
    told = [column for column in columns if all(image[column] is not None for image in images)]
    sums = [sum(worth(column, image[column]) for column in told) for image in images]
    return sums.index(max(sums))


def is_flagged(image: Scores, thresholds: Mapping[str, float]) -> bool | None:
    """Whether a score is worse than its threshold; None where no score with a threshold could be told."""
    told = [(column, least) for column, least in thresholds.items() if image[column] is not None]
    return any(worth(column, image[column]) < worth(column, least) for column, least in told) if told else None
