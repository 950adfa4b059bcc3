"""Pools by their number, the next one made by another process while this one is used."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor

from context_diffusion.training.config import TrainingJob
from context_diffusion.training.data import VALIDATION_SEED, Pool, make_pool


class Pools:
    """`at(number)` gives the pool of that number. workers: 0 makes pools in this process, as they are asked for."""

    def __init__(self, job: TrainingJob, image_size: int, workers: int = 1) -> None:
        self.job, self.image_size = job, image_size
        self._current: tuple[int, Pool] | None = None
        self._next: tuple[int, Future[Pool]] | None = None
        self._validation: Pool | None = None
        self._executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) if workers else None

    def at(self, number: int) -> Pool:
        if self._current is None or self._current[0] != number:
            ahead = self._next is not None and self._next[0] == number
            pool = self._next[1].result() if self._next and ahead else make_pool(*self._arguments(number))
            self._current = (number, pool)
            if self._executor:
                self._next = (number + 1, self._executor.submit(make_pool, *self._arguments(number + 1)))
        return self._current[1]

    def validation(self) -> Pool:
        """Held-out styles on layouts that training never sees."""
        if self._validation is None:
            seed = VALIDATION_SEED + self.job.seed
            self._validation = make_pool(seed, 32, self.job.pictures, self.image_size, held_out=True)
        return self._validation

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def _arguments(self, number: int) -> tuple[int, int, int, int]:
        job = self.job
        return (job.seed * 1_000_003 + number, job.styles, job.pictures, self.image_size)
