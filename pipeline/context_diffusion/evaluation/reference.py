"""Distances of an evaluate job's pictures to reference pictures, in the space of its encoder.

N pictures  D features
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from context_diffusion.errors import JobError, RowError
from context_diffusion.evaluation.config import EvaluateJob
from context_diffusion.evaluation.distances import Features, frechet_distance, kernel_distance
from context_diffusion.evaluation.pairs import Pair, of_output, source_key
from context_diffusion.images import ENDINGS
from context_diffusion.output import Output
from context_diffusion.schema import Pixels
from context_diffusion.sources import Source
from context_diffusion.storage import Storage, normal

LEAST = 2  # pictures of a covariance
BATCH = 16


def reference_sources(job: EvaluateJob, pairs: Sequence[Pair], storage: Storage) -> list[Source]:
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

    def __init__(self, job: EvaluateJob, sources: list[Source], read: Callable[[Source], Pixels]) -> None:
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

    def _embedded(self, sources: list[Source]) -> tuple[Features, int]:
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
