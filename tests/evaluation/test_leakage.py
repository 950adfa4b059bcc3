"""Leakage is told from none, on planted cases."""

from __future__ import annotations

import numpy as np
import pytest

from context_diffusion.evaluation.leakage import colour_leakage, layout_leakage
from context_diffusion.evaluation.shuffled_controls import auc
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import Style, dress, make_lut
from support.held_out import HeldOut, held_out_rows, recoloured


def blended(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * 0.5 + second * 0.5).astype(np.uint8)


def layout_leaks(rows: list[HeldOut], pictures: list[np.ndarray]) -> list[float]:
    return [layout_leakage(image, row.query, row.contexts) for row, image in zip(rows, pictures, strict=True)]


def test_a_contexts_layout_in_the_picture_is_told_from_none() -> None:
    rows = held_out_rows()
    none = layout_leaks(rows, [row.truth for row in rows])
    mixed = layout_leaks(rows, [blended(row.truth, row.contexts[-1]) for row in rows])
    whole = layout_leaks(rows, [row.contexts[-1] for row in rows])
    assert np.quantile(none, 0.9) < 0.1
    assert auc(mixed, none) >= 0.95
    assert auc(whole, none) >= 0.99
    assert np.quantile(whole, 0.1) > 0.9
    assert 0.3 < np.median(mixed) < 0.7


def test_a_texture_that_the_context_has_too_is_no_leak() -> None:
    rng = np.random.default_rng(4)
    striped = Style("ocean", "stripes", make_lut(rng, "ocean"), 8, 0.7, 0.17, "all", 0, (0, 0), 0)
    for _ in range(8):
        tones = [make_layout(rng, 128)[1] for _ in range(2)]
        picture, context = (dress(tone, striped, rng) for tone in tones)
        assert (
            layout_leakage(
                picture, dress(tones[0], Style(**{**vars(striped), "texture": "flat"}), rng), [context]
            )
            < 0.2
        )


def colour_leaks(rows: list[HeldOut], pictures: list[np.ndarray]) -> list[float]:
    leaks = [
        colour_leakage(image, row.query, row.contexts) for row, image in zip(rows, pictures, strict=True)
    ]
    return [leak for leak in leaks if leak is not None]


def test_the_querys_colours_in_the_picture_are_told_from_none() -> None:
    rows = held_out_rows()
    none = colour_leaks(rows, [row.truth for row in rows])
    worn = [recoloured(row.truth, row.query) for row in rows]
    mixed, whole = (
        colour_leaks(rows, [blended(row.truth, w) for row, w in zip(rows, worn, strict=True)]),
        colour_leaks(rows, worn),
    )
    assert len(none) >= 0.9 * len(rows)
    assert np.quantile(none, 0.9) < 0.15
    assert auc(mixed, none) >= 0.95
    assert auc(whole, none) >= 0.99
    assert np.quantile(whole, 0.1) > 0.85
    assert 0.3 < np.median(mixed) < 0.7
    foreign = colour_leaks(rows, [recoloured(row.truth, 255 - row.contexts[0]) for row in rows])
    assert np.median(foreign) < 0.3, "colours that neither shows are not the query's"


def test_where_query_and_contexts_share_their_colours_no_leak_is_told() -> None:
    row = held_out_rows()[0]
    assert colour_leakage(row.truth, recoloured(row.query, row.contexts[0]), row.contexts) is None


def test_a_large_picture_leaks_what_it_leaks_at_its_small_size() -> None:
    rows = held_out_rows()
    for row, other in zip(rows[:6], rows[6:12], strict=True):
        shown = [one.repeat(4, 0).repeat(4, 1) for one in (row.truth, row.query, other.truth)]
        small = (
            layout_leakage(row.truth, row.query, [other.truth]),
            layout_leakage(other.truth, row.query, [other.truth]),
        )
        large = (
            layout_leakage(shown[0], shown[1], [shown[2]]),
            layout_leakage(shown[2], shown[1], [other.truth]),
        )
        assert large == pytest.approx(small, abs=0.1)
        assert large[1] > 0.5
