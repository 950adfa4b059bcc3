"""Data that other processes make ahead of its use, so that a fast device need not wait for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """`at(number)` gives make(number), which pickles, while the next numbers are being made, one by each process.
    processes: 0 makes each here, when it is asked for."""

    def __init__(self, make: Callable[[int], Made], processes: int) -> None:
        self._make, self._processes = make, processes
        self._made: dict[int, Future[Made]] = {}
        # spawn: a fork of a process that has threads, torch's among them, may hang
        self._executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) if processes else None

    def at(self, number: int) -> Made:
        if self._executor is None:
            return self._make(number)
        wanted = range(number, number + 1 + self._processes)
        for passed in self._made.keys() - set(wanted):
            self._made.pop(passed).cancel()
        for one in wanted:
            if one not in self._made:
                self._made[one] = self._executor.submit(self._make, one)
        return self._made.pop(number).result()

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)
