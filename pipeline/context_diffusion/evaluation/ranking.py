"""How well scores tell true pairs from false ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def named_first(scores: NDArray[np.float64]) -> float:
    """The share of rows whose own candidate, on the diagonal, has the highest score. scores: (N, N) square."""
    return float((scores.argmax(1) == np.arange(len(scores))).mean())


def auc(true: ArrayLike, false: ArrayLike) -> float:
    """The chance that a true pair's score is above a false one's, ties by half (Mann and Whitney 1947); .5 by chance."""
    high, low = np.asarray(true, np.float64), np.sort(np.asarray(false, np.float64))
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))
