"""How far two sets of pictures lie apart, as sets of features. numpy alone.

N M pictures  D features
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
BLOCK = 1024  # rows of a kernel matrix at once


def frechet_distance(first: Features, second: Features) -> float:
    """Of the Gaussians with the mean and covariance of (N, D) and (M, D): |m - n|² + tr(A + B - 2 (A B)^½) (Fréchet 1957;
    the FID of Heusel et al. 2017 with other features). Its estimate is too large, the more so the fewer pictures there
    are; of fewer than D the covariance says nothing in some directions."""
    (mean, own), (other_mean, other) = ((set_.mean(0), np.atleast_2d(np.cov(set_.T))) for set_ in (first, second))
    # (A B)^½ and (A^½ B A^½)^½ have the same trace, and the latter is symmetric: no square root of a general matrix.
    values, vectors = np.linalg.eigh(own)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    return max(0.0, float(((mean - other_mean) ** 2).sum() + np.trace(own + other) - 2 * shared))


def kernel_distance(first: Features, second: Features) -> float:
    """MMD² with the kernel (x·y / D + 1)³, unbiased and over all pairs (the KID of Bińkowski et al. 2018 with other
    features): about 0 for sets of one kind, and then as often below it."""
    n, m = len(first), len(second)
    within = [(_kernel_sum(set_, set_) - _kernel_diagonal(set_)) / (len(set_) * (len(set_) - 1)) for set_ in (first, second)]
    return sum(within) - 2 * _kernel_sum(first, second) / (n * m)


def _kernel_sum(first: Features, second: Features) -> float:
    return sum(float(((block @ second.T / first.shape[1] + 1) ** 3).sum()) for block in _blocks(first))


def _kernel_diagonal(features: Features) -> float:
    return float((((features**2).sum(1) / features.shape[1] + 1) ** 3).sum())


def _blocks(features: Features) -> Iterator[Features]:
    return (features[begin : begin + BLOCK] for begin in range(0, len(features), BLOCK))
