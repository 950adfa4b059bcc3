"""Pools by their number, the next ones made by other processes while one is used."""

from __future__ import annotations

from functools import partial

from context_diffusion.training.ahead import Ahead
from context_diffusion.training.config import TrainingJob
from context_diffusion.training.data import VALIDATION_SEED, Pool, make_pool


class Pools:
    """`at(number)` gives the pool of that number, held until another is asked for."""

    def __init__(self, job: TrainingJob, image_size: int) -> None:
        self.job, self.image_size = job, image_size
        self._ahead = Ahead(partial(make_pool, styles=job.styles, pictures=job.pictures, size=image_size), job.processes)
        self._current: tuple[int, Pool] | None = None
        self._validation: Pool | None = None

    def at(self, number: int) -> Pool:
        if self._current is None or self._current[0] != number:
            self._current = (number, self._ahead.at(self.job.seed * 1_000_003 + number))
        return self._current[1]

    def validation(self) -> Pool:
        """Held-out styles on layouts that training never sees."""
        if self._validation is None:
            seed = VALIDATION_SEED + self.job.seed
            self._validation = make_pool(seed, 32, self.job.pictures, self.image_size, held_out=True)
        return self._validation

    def close(self) -> None:
        self._ahead.close()
