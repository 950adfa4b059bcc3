"""Two systems' images of the same rows: paired differences of their scores.

A row counts once, with the mean of its images: they share query, contexts and prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.schema import ID
from context_diffusion.evaluation.scores import worth

Row = dict[str, Any]


def compared(ours: Sequence[Row], theirs: Sequence[Row], columns: Sequence[str]) -> dict[str, Row]:
    """Compare each score column over the rows that both have: the means, ours less theirs, in how many rows ours is better
    (of a leakage: lower), worse and equal, and the sign test's p. Nothing but `rows` where there are none."""
    told = {}
    for column in columns:
        mine, other = _by_row(ours, column), _by_row(theirs, column)
        shared = [row for row in mine if row in other]
        told[column] = {"rows": len(shared)}
        if shared:
            first, second = (np.array([of[row] for row in shared]) for of in (mine, other))
            told[column] |= _paired(first, second, worth(column, 1) - worth(column, 0))
    return told


def _by_row(rows: Sequence[Row], column: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get(column) is not None:
            found.setdefault(row[ID], []).append(row[column])
    return {row: math.fsum(values) / len(values) for row, values in found.items()}


def _paired(ours: NDArray[np.float64], theirs: NDArray[np.float64], sign: float) -> Row:
    """sign: 1 where more is better."""
    differences = ours - theirs
    better, worse = (int((side * sign * differences > 0).sum()) for side in (1, -1))
    means = {"mean": float(ours.mean()), "compared": float(theirs.mean()), "difference": float(differences.mean())}
    return means | {"better": better, "worse": worse, "equal": len(ours) - better - worse, "p": sign_test(better, worse)}


def sign_test(better: int, worse: int) -> float:
    """The chance of so many of one kind or more by a fair coin, both sides; rows that are equal say nothing."""
    count = better + worse

    def chance(k: int) -> float:  # by logarithms: the binomials of many rows have thousands of digits
        return math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2))

    return min(1.0, 2 * math.fsum(chance(k) for k in range(min(better, worse) + 1)))
