"""Edges tell layouts apart through other styles; boundaries agree within a tolerance and not beyond."""

from __future__ import annotations

import numpy as np
import pytest

from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.shuffled_controls import auc
from support.held_out import held_out_rows
from support.measures import boundary_f1, named_first


def test_the_layout_score_tells_the_query_of_a_picture_from_another_one() -> None:
    rows = held_out_rows()
    true = [layout_score(row.truth, row.query) for row in rows]
    false = [
        layout_score(a.truth, b.query)
        for a, b in zip(rows, rows[5:] + rows[:5], strict=True)
        if a.layout != b.layout
    ]
    assert auc(true, false) >= 0.95
    groups = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    named = [
        named_first(np.array([[layout_score(a.truth, b.query) for b in group] for a in group]))
        for group in groups
    ]
    assert np.mean(named) >= 0.8


def test_a_picture_has_its_own_layout_whatever_its_brightness_and_size() -> None:
    image = held_out_rows()[1].truth
    assert layout_score(image, image) == pytest.approx(1, abs=1e-4)
    assert layout_score(image, (image * 0.5 + 60).astype(np.uint8)) > 0.9
    assert layout_score(image, image.repeat(2, 0).repeat(2, 1)) > 0.98
    assert layout_score(np.zeros((64, 64, 3), np.uint8), image) == pytest.approx(0, abs=1e-3)


def square(left: int, tone: int = 200) -> np.ndarray:
    image = np.full((96, 96, 3), 60, np.uint8)
    image[24:72, left : left + 40] = tone
    return image


def test_boundaries_agree_within_the_tolerance_and_not_beyond() -> None:
    assert boundary_f1(square(20), square(20)) == 1
    assert boundary_f1(square(20), square(20, tone=90)) == 1, "a low contrast has the same boundaries"
    assert boundary_f1(square(20), square(22)) > 0.98
    moved = boundary_f1(square(20), square(26))
    assert 0.4 < moved < 0.7, "the sides are missed, most of top and bottom is not"
    assert boundary_f1(square(20), square(26), tolerance_px=7) > 0.98
    level = np.full((96, 96, 3), 60, np.uint8)
    assert (boundary_f1(level, level), boundary_f1(square(20), level)) == (1, 0)


def test_boundaries_of_a_blurred_truth_are_nearer_than_another_picture_of_that_style() -> None:
    rows = held_out_rows()
    # 126 of 128 pixels and back: what an autoencoder costs, about.
    true = [boundary_f1(row.truth, row.truth[1:-1, 1:-1]) for row in rows]
    false = [boundary_f1(row.truth, row.contexts[0]) for row in rows]
    assert auc(true, false) >= 0.95
