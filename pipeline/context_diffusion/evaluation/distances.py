"""Distances between two sets of images, as sets of features.

N M images  D features
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
from context_diffusion.evaluation.pairs import Pair, pairs_of_output, scored_images, source_key
from context_diffusion.inputs.decode import ENDINGS
from context_diffusion.inputs.image_sources import ImageSource
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

Features = NDArray[np.float64]

BLOCK = 1024  # rows of a kernel matrix that are computed at once
MIN_IMAGES = 2  # for a covariance
BATCH = 16


def frechet_distance(first: Features, second: Features) -> float:
    """Return the Fréchet distance of the Gaussians fitted to features (N, D) and (M, D).

    |m - n|² + tr(A + B - 2 (A B)^½) (Fréchet 1957; the FID of Heusel et al. 2017 with other features). The
    estimate is too large, the more so the fewer the images; below D images the covariance is undefined in
    some directions.
    """
    first_mean = first.mean(0)
    second_mean = second.mean(0)
    first_covariance = np.atleast_2d(np.cov(first.T))
    second_covariance = np.atleast_2d(np.cov(second.T))
    # (A B)^½ and (A^½ B A^½)^½ have the same trace, and the latter is symmetric: no square root of a general
    # matrix.
    values, vectors = np.linalg.eigh(first_covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ second_covariance @ root).clip(0)).sum()
    traces = np.trace(first_covariance + second_covariance)
    return max(0.0, float(((first_mean - second_mean) ** 2).sum() + traces - 2 * trace_of_root))


def kernel_distance(first: Features, second: Features) -> float:
    """Return the MMD² with the kernel (x·y / D + 1)³, unbiased and over all pairs.

    This is the KID of Bińkowski et al. 2018 with other features. It is 0 on average for sets of one
    distribution, so it can be negative.
    """
    within = _mean_within(first) + _mean_within(second)
    return within - 2 * _kernel_sum(first, second) / (len(first) * len(second))


def _mean_within(features: Features) -> float:
    """Return the mean kernel over all pairs of different images of a set."""
    return (_kernel_sum(features, features) - _kernel_diagonal(features)) / (
        len(features) * (len(features) - 1)
    )


def _kernel_sum(first: Features, second: Features) -> float:
    return sum(float(((block @ second.T / first.shape[1] + 1) ** 3).sum()) for block in _blocks(first))


def _kernel_diagonal(features: Features) -> float:
    return float((((features**2).sum(1) / features.shape[1] + 1) ** 3).sum())


def _blocks(features: Features) -> Iterator[Features]:
    return (features[begin : begin + BLOCK] for begin in range(0, len(features), BLOCK))


def reference_sources(job: EvaluateJob, pairs: Sequence[Pair], storage: Storage) -> list[ImageSource]:
    """Return each reference image once: from the manifest's column, an OUTPUT, or a folder with subfolders.

    Raises JobError if there are fewer than MIN_IMAGES.
    """
    if job.reference is None:
        sources = [pair.reference for pair in pairs if pair.reference]
    else:
        folder = Output(normal(job.reference), storage)
        if storage.exists(folder.plan):
            sources = scored_images(pairs_of_output(folder))
        else:
            names = [name for name in storage.files(folder.root) if name.lower().endswith(ENDINGS)]
            sources = [{"bytes": None, "path": name} for name in names]
    unique = list({source_key(source): source for source in sources}.values())
    if len(unique) < MIN_IMAGES:
        where = job.reference or f"the manifest's column {job.columns['reference']}"
        raise JobError(f"reference: {where} has {len(unique)} images, distances need at least {MIN_IMAGES}")
    return unique


class References:
    """The features of the reference images, computed once, and the distances of other images to them."""

    def __init__(
        self, job: EvaluateJob, sources: list[ImageSource], read: Callable[[ImageSource], Pixels]
    ) -> None:
        """read: raises RowError for an unreadable image, which is skipped and counted."""
        self.encoder = job.encoder
        self._read = read
        self._features, self._skipped = self._embed(sources)

    def distances(self, pairs: Iterable[Pair]) -> dict[str, Any]:
        """Return the Fréchet and the kernel distance, None for too few images, and the counts behind them."""
        features, skipped = self._embed(scored_images(pairs))
        fewest = min(len(features), len(self._features))
        width = self._features.shape[1]
        enough = fewest >= MIN_IMAGES
        summary: dict[str, Any] = {
            "frechet": frechet_distance(features, self._features) if enough else None,
            "kernel": kernel_distance(features, self._features) if enough else None,
            "encoder": self.encoder,
            "features": width,
            "pictures": len(features),
            "references": len(self._features),
        }
        if skipped or self._skipped:
            summary["left_out"] = skipped + self._skipped
        if fewest < width:
            warning = (
                f"{fewest} images for {width} features: the Fréchet distance is too large, "
                "use the kernel distance"
            )
            summary["warning"] = warning
            logging.getLogger(__name__).warning("reference: %s", warning)
        return summary

    def _embed(self, sources: list[ImageSource]) -> tuple[Features, int]:
        """Return the features (N, D) and the number of unreadable images.

        Raises JobError if all are unreadable.
        """
        from context_diffusion.evaluation.similarity import embedded  # imports torch

        batches: list[Features] = []
        images: list[Pixels] = []
        skipped = 0
        for number, source in enumerate(sources):
            try:
                images.append(self._read(source))
            except RowError:
                skipped += 1
            if images and (len(images) == BATCH or number == len(sources) - 1):
                batches.append(embedded(images, self.encoder))
                images = []
        if not batches:
            message = (
                f"reference: none of {len(sources)} images are readable, the first is {sources[0]['path']}"
            )
            raise JobError(message)
        return np.concatenate(batches), skipped
