"""Compares two systems' images of the same rows by the paired differences of their scores.

A row counts once, with the mean score of its images: they share query, contexts and prompt.
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


def compared(rows: Sequence[Row], baseline_rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Row]:
    """Compare each score column over the rows that both systems have.

    Returns the means, the mean difference to the baseline, the number of rows that are better (of a leakage:
    lower), worse and equal, and the p of the sign test. Only `rows` is returned for a column without shared
    rows.
    """
    statistics: dict[str, Row] = {}
    for column in columns:
        by_row = _by_row(rows, column)
        baseline_by_row = _by_row(baseline_rows, column)
        shared = [row for row in by_row if row in baseline_by_row]
        statistics[column] = {"rows": len(shared)}
        if shared:
            values = np.array([by_row[row] for row in shared])
            baseline = np.array([baseline_by_row[row] for row in shared])
            statistics[column] |= _paired(values, baseline, worth(column, 1) - worth(column, 0))
    return statistics


def _by_row(rows: Sequence[Row], column: str) -> dict[str, float]:
    """Return the mean score of each row's images, by id."""
    values_by_row: dict[str, list[float]] = {}
    for row in rows:
        if row.get(column) is not None:
            values_by_row.setdefault(row[ID], []).append(row[column])
    return {row: math.fsum(values) / len(values) for row, values in values_by_row.items()}


def _paired(values: NDArray[np.float64], baseline: NDArray[np.float64], sign: float) -> Row:
    """Compare paired values. sign: 1 if higher is better, else -1."""
    differences = values - baseline
    better = int((sign * differences > 0).sum())
    worse = int((sign * differences < 0).sum())
    return {
        "mean": float(values.mean()),
        "compared": float(baseline.mean()),
        "difference": float(differences.mean()),
        "better": better,
        "worse": worse,
        "equal": len(values) - better - worse,
        "p": sign_test(better, worse),
    }


def sign_test(better: int, worse: int) -> float:
    """Return the p of the two-sided sign test: how likely a fair coin is at least this uneven.

    Equal rows are ignored.
    """
    count = better + worse

    def probability(k: int) -> float:  # by logarithms: the binomials of many rows have thousands of digits
        log_binomial = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return math.exp(log_binomial - count * math.log(2))

    return min(1.0, 2 * math.fsum(probability(k) for k in range(min(better, worse) + 1)))
