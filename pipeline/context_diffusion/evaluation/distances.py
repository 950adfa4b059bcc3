"""How far two sets of pictures lie apart, as sets of features. numpy alone.

N M pictures  D features
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.errors import JobError, RowError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.records import Pixels
from context_diffusion.core.uris import normal
from context_diffusion.evaluation.pairs import Pair, of_output, source_key
from context_diffusion.inputs.decode import ENDINGS
from context_diffusion.inputs.image_sources import ImageSource
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

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


LEAST = 2  # pictures of a covariance

BATCH = 16


def reference_sources(job: EvaluateJob, pairs: Sequence[Pair], storage: Storage) -> list[ImageSource]:
    """Each once: what the manifest's column names, the pictures of an OUTPUT, or all of a folder and those below it.
    Raises JobError where there are none."""
    if job.reference is None:
        named = [pair.reference for pair in pairs if pair.reference]
    else:
        folder = Output(normal(job.reference), storage)
        if storage.exists(folder.plan):
            named = [pair.picture for pair in of_output(folder) if pair.picture and not pair.error]
        else:
            names = [name for name in storage.files(folder.root) if name.lower().endswith(ENDINGS)]
            named = [{"bytes": None, "path": name} for name in names]
    found = list({source_key(source): source for source in named}.values())
    if len(found) < LEAST:
        where = job.reference or f"the manifest's column {job.columns['reference']}"
        raise JobError(f"reference: {where} has {len(found)} pictures, distances need {LEAST} at least")
    return found


class References:
    """The reference pictures' features, made once, for the pictures of one or two systems."""

    def __init__(self, job: EvaluateJob, sources: list[ImageSource], read: Callable[[ImageSource], Pixels]) -> None:
        """read: raises RowError for a picture that is none; it is left out and counted."""
        self.encoder, self._read = job.encoder, read
        self._features, self._left_out = self._embedded(sources)

    def distances(self, pairs: Iterable[Pair]) -> dict[str, Any]:
        """frechet and kernel, None where there are too few pictures, with the numbers that they depend on."""
        made, left_out = self._embedded([pair.picture for pair in pairs if pair.picture and not pair.error])
        least, width = min(len(made), len(self._features)), self._features.shape[1]
        told: dict[str, Any] = {"frechet": None, "kernel": None}
        if least >= LEAST:
            told = {"frechet": frechet_distance(made, self._features), "kernel": kernel_distance(made, self._features)}
        told |= {"encoder": self.encoder, "features": width, "pictures": len(made), "references": len(self._features)}
        if left_out or self._left_out:
            told["left_out"] = left_out + self._left_out
        if least < width:
            told["warning"] = f"{least} pictures for {width} features: the Fréchet distance is too large, compare kernel's"
            logging.getLogger(__name__).warning("reference: %s", told["warning"])
        return told

    def _embedded(self, sources: list[ImageSource]) -> tuple[Features, int]:
        """-> (N, D), and how many could not be read."""
        from context_diffusion.evaluation.similarity import embedded  # torch

        batches, images, left_out = [], list[Pixels](), 0
        for number, source in enumerate(sources):
            try:
                images.append(self._read(source))
            except RowError:
                left_out += 1
            if images and (len(images) == BATCH or number == len(sources) - 1):
                batches.append(embedded(images, self.encoder))
                images = []
        if not batches:
            raise JobError(f"reference: none of {len(sources)} pictures could be read, the first is {sources[0]['path']}")
        return np.concatenate(batches), left_out
