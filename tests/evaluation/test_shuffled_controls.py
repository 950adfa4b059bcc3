"""The measures of the measures."""

from __future__ import annotations

import numpy as np

from context_diffusion.evaluation.shuffled_controls import auc
from support.measures import named_first


def test_auc_is_the_chance_to_be_above_with_ties_by_half() -> None:
    rng = np.random.default_rng(1)
    true, false = rng.integers(0, 9, 50), rng.integers(0, 7, 70)
    pairs = true[:, None] - false[None]
    assert np.isclose(auc(true, false), (pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert (auc([2, 3], [0, 1]), auc([0], [1]), auc([1], [1])) == (1, 0, 0.5)


def test_named_first_counts_the_diagonal() -> None:
    assert named_first(np.array([[3, 1, 2], [1, 0, 2], [0, 1, 5]], float)) == 2 / 3
