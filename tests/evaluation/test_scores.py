"""The scores tell true pairs from shuffled ones, on what the generator makes and on what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from context_diffusion.evaluation import layout_score, named_first, palette, palette_distance, style_score
from context_diffusion.training.layouts import make_layout
from context_diffusion.training.styles import dress, make_style


@pytest.fixture(scope="module")
def pictures() -> list[list[np.ndarray]]:
    """[layout][style], 12 x 12."""
    rng = np.random.default_rng(5)
    tones = [make_layout(rng, 96)[1] for _ in range(12)]
    styles = [make_style(rng) for _ in range(12)]
    return [[dress(tone, style, rng) for style in styles] for tone in tones]


def test_the_layout_score_names_the_layout_through_another_style(pictures: list[list[np.ndarray]]) -> None:
    scores = np.array([[layout_score(pictures[i][2], pictures[j][7]) for j in range(12)] for i in range(12)])
    assert named_first(scores) >= 0.8
    true, false = np.diag(scores), scores[~np.eye(12, dtype=bool)]
    assert (true[:, None] > false[None]).mean() >= 0.9


def test_the_style_score_names_the_style_on_another_layout(pictures: list[list[np.ndarray]]) -> None:
    scores = np.array([[style_score(pictures[0][i], [pictures[5][j], pictures[6][j]]) for j in range(12)] for i in range(12)])
    assert named_first(scores) >= 0.75
    true, false = np.diag(scores), scores[~np.eye(12, dtype=bool)]
    assert (true[:, None] > false[None]).mean() >= 0.9


def test_a_picture_is_like_itself_whatever_its_brightness(pictures: list[list[np.ndarray]]) -> None:
    image = pictures[1][3]
    assert layout_score(image, image) == pytest.approx(1, abs=1e-4)
    assert style_score(image, [image]) == 1
    assert layout_score(image, (image * 0.5 + 60).astype(np.uint8)) > 0.9
    assert palette_distance(palette([image]), palette([np.zeros_like(image)])) > 5
    assert layout_score(np.zeros((64, 64, 3), np.uint8), image) == pytest.approx(0, abs=1e-3)
