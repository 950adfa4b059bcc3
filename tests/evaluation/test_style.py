"""Colours and textures tell styles apart on other layouts."""

from __future__ import annotations

import numpy as np
import pytest

from context_diffusion.evaluation.shuffled_controls import auc
from context_diffusion.evaluation.style import chamfer, palette, style_score, textures
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import Style, dress, make_lut
from support.held_out import held_out_rows
from support.measures import named_first


def test_the_style_score_tells_the_contexts_of_a_picture_from_others() -> None:
    rows = held_out_rows()
    true = [style_score(row.truth, row.contexts) for row in rows]
    false = [style_score(a.truth, b.contexts) for a, b in zip(rows, rows[5:] + rows[:5], strict=True)]
    assert auc(true, false) >= 0.95
    groups = [rows[i : i + 8] for i in range(0, 16, 8)]
    named = [
        named_first(np.array([[style_score(a.truth, b.contexts) for b in group] for a in group]))
        for group in groups
    ]
    assert np.mean(named) >= 0.9


def test_textures_tell_what_colours_cannot() -> None:
    """One palette, two textures: the right one scores higher."""
    rng = np.random.default_rng(3)
    lut = make_lut(rng, "ocean")
    wins = []
    for _ in range(12):
        flat, striped = (
            Style("ocean", name, lut, 8, 0.7, 0.17, "all", 0, (0, 0), 0) for name in ("flat", "stripes")
        )
        tones = [make_layout(rng, 128)[1] for _ in range(3)]
        image = dress(tones[0], striped, rng)
        wins.append(
            style_score(image, [dress(tones[1], striped, rng)])
            > style_score(image, [dress(tones[1], flat, rng)])
        )
        near, far = (
            chamfer(textures([image]), textures([dress(tones[2], style, rng)])) for style in (striped, flat)
        )
        wins.append(near < far)
    assert np.mean(wins) >= 0.9


def test_a_picture_has_its_own_style_on_any_scale() -> None:
    image = held_out_rows()[1].truth
    assert style_score(image, [image]) == 1
    assert style_score(image, [image.repeat(2, 0).repeat(2, 1)]) > 0.9
    assert style_score(image, [255 - image]) < style_score(image, [image[:, ::-1]])
    black = np.zeros_like(image)
    assert chamfer(palette([image]), palette([black])) > 5
    assert textures([image]).shape == (36, 18)
    assert textures([black]) == pytest.approx(0)
