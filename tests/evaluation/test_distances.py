"""Distances between sets of features, against closed forms and independent sums."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from context_diffusion.evaluation import distances
from context_diffusion.evaluation.distances import Features, frechet_distance, kernel_distance


def gaussian(seed: int, count: int, mean: list[float], root: Features) -> Features:
    """A set whose mean is `mean` and whose covariance is root.T root, exactly."""
    drawn = np.random.default_rng(seed).normal(size=(count, len(mean)))
    drawn -= drawn.mean(0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T
    return np.asarray(white @ root + np.array(mean))


def test_the_frechet_distance_of_gaussians_along_the_axes() -> None:
    first, second = (
        gaussian(1, 40, [0, 1, 2], np.diag([1.0, 2.0, 3.0])),
        gaussian(2, 50, [1, 1, 0], np.diag([2.0, 2.0, 0.5])),
    )
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 0.5) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    one = np.random.default_rng(0).normal(size=(30, 1))
    assert frechet_distance(one, 3 * one + 2) == pytest.approx(
        (2 + 2 * one.mean()) ** 2 + 4 * one.var(ddof=1)
    )


def test_the_frechet_distance_of_any_gaussians_and_of_fewer_pictures_than_features() -> None:
    roots = np.random.default_rng(3).normal(size=(2, 5, 5))
    first, second = (gaussian(seed, 60, [0] * 5, root) for seed, root in enumerate(roots))
    a, b = (root.T @ root for root in roots)
    assert frechet_distance(first, second) == pytest.approx(
        np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    )
    few = np.random.default_rng(4).normal(size=(4, 9))
    assert frechet_distance(few, few[::-1]) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_is_over_all_pairs_but_those_of_a_picture_with_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distances, "BLOCK", 4)
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(9, 3)), rng.normal(size=(6, 3)) + 0.5

    def mean(one: Features, other: Features) -> float:
        kernel = [
            [(x @ y / 3 + 1) ** 3 for j, y in enumerate(other) if one is not other or i != j]
            for i, x in enumerate(one)
        ]
        return float(np.mean(kernel))

    expected = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    assert kernel_distance(first, second) == pytest.approx(expected)


def test_the_kernel_distance_of_small_sets_of_one_kind_is_none_on_average() -> None:
    rng = np.random.default_rng(6)
    same = [kernel_distance(rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for _ in range(2000)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0
