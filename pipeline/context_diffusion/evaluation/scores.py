"""All scores of one picture, by the names that jobs and columns use."""

from __future__ import annotations

from collections.abc import Sequence

from context_diffusion.config import ScoreName
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.leakage import colour_leakage, layout_leakage
from context_diffusion.evaluation.style import style_score
from context_diffusion.schema import Pixels

COLUMNS: dict[ScoreName, tuple[str, ...]] = {
    "layout": ("layout_score",),
    "style": ("style_score",),
    "similarity": ("style_similarity",),
    "prompt": ("prompt_score",),
    "leakage": ("layout_leakage", "colour_leakage"),
}


def columns_of(wanted: Sequence[ScoreName]) -> list[str]:
    return [column for name in COLUMNS if name in wanted for column in COLUMNS[name]]


def measure(
    column: str,
    image: Pixels,
    query: Pixels,
    contexts: list[Pixels],
    prompt: str | None,
    judge: str = "bundled",
    encoder: str = "bundled",
) -> float | None:
    """The score of that column; None where there is nothing to compare with. judge: see prompt.py; encoder: see
    similarity.py."""
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
