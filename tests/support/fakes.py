"""Engines at the real seam (stages.Engine) for tests of the flow: quick, deterministic by the row, some
deadly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result

Broken = Callable[[BaseException], None]


class FakeEngine:
    """The picture: the query with the first context's mean colour and a value of the seed mixed in."""

    def __init__(self, seconds: float = 0.0, deadly: str | None = None, once: Path | None = None) -> None:
        self.seconds, self.deadly, self.once = seconds, deadly, once

    def generate(self, requests: list[Request]) -> list[Result | Failure]:
        return [self._make(request) for request in requests]

    def _make(self, request: Request) -> Result:
        if request.id == self.deadly and (self.once is None or not self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        colour = request.contexts[0].reshape(-1, 3).mean(0)
        seed = request.settings.seed or 0
        mixed = request.query * 0.5 + colour * 0.4 + seed % 25
        return Result(np.clip(mixed, 0, 255).astype(np.uint8), 0.01, 1, "cpu", chunk=4)


def quick(job: GenerateJob, broken: Broken) -> FakeEngine:
    return FakeEngine()


def slow(job: GenerateJob, broken: Broken) -> FakeEngine:
    return FakeEngine(seconds=0.05)


def poisoned(job: GenerateJob, broken: Broken) -> FakeEngine:
    """Its process ends whenever it meets row 33."""
    return FakeEngine(deadly="row-033")


def dies_once(job: GenerateJob, broken: Broken) -> FakeEngine:
    """Its process ends at row 120, the first time."""
    return FakeEngine(seconds=0.01, deadly="row-120", once=Path(f"{job.output}.died"))


def loads_long(job: GenerateJob, broken: Broken) -> FakeEngine:
    """As one that reads 13 GB of weights: longer than the time that a flow may stand still."""
    time.sleep(40)
    return FakeEngine()


def hangs(job: GenerateJob, broken: Broken) -> FakeEngine:
    return FakeEngine(seconds=3600)


def cannot_start(job: GenerateJob, broken: Broken) -> FakeEngine:
    raise RuntimeError("the device of this test does not exist")


def native(job: GenerateJob, broken: Broken) -> object:
    """No fake: the bundled model's own engine."""
    from context_diffusion.pipeline import make_engine

    return make_engine(job, broken)
