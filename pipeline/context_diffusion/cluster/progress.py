"""Progress on stderr: a bar in a terminal, a line now and then elsewhere, and as JSON also each shard and failed row."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.core.records import Counts
from context_diffusion.core.schema import COUNTED, STAGES

EVERY_SECONDS = 10.0


class Progress:
    """rows: of the whole job; before: what earlier runs made; logs: where Ray writes its own."""

    def __init__(self, rows: int, before: Counts, logs: str) -> None:
        self.counts = Counts(before.rows, before.ok, before.failed, before.images, dict(before.codes))
        self.rows, self._first, self._logs = rows, before.rows, logs
        self._made, self._started, self._told = 0, time.monotonic(), time.monotonic()
        self._sums = dict.fromkeys(COUNTED, 0.0)
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        text = f"{self.rows} rows, {self._first} done before; Ray's logs: {self._logs}"
        LOG.tell("started", text, rows=self.rows, done=self._first, logs=self._logs)
        if LOG.is_terminal and LOG.format == LogFormat.TEXT:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=LOG.console)
            self._bar.start()
            self._task = self._bar.add_task("rows", total=self.rows, completed=self._first, told="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif self.counts.rows > self._first:
            self._line()

    def add(self, counts: dict[str, Any]) -> None:
        """A written shard: a row of schema.WRITTEN."""
        self.counts.rows += counts["rows"]
        self.counts.failed += counts["failed"]
        self.counts.images += counts["images"]
        self.counts.ok = self.counts.rows - self.counts.failed
        for code, failed in counts["codes"]:
            self.counts.codes[code] = self.counts.codes.get(code, 0) + failed
        _tell(counts)
        for name in COUNTED:
            self._sums[name] += counts[name]
        self._made += counts["images_made"]
        if self._bar:
            self._bar.update(self._task, completed=self.counts.rows, told=self._rate())
        elif time.monotonic() - self._told > EVERY_SECONDS:
            self._line()

    @property
    def occupancy(self) -> float | None:
        """The share of the lane-steps in this run's calls of the model that rows used; None where none was called."""
        used, paid = (self._sums[name] for name in COUNTED)
        return round(used / paid, 4) if paid else None

    @property
    def _pace(self) -> float:
        return self._made / max(time.monotonic() - self._started, 1e-6)

    def _rate(self) -> str:
        return f"{self._pace:.2f} images/s, {self.counts.failed} failed"

    def _line(self) -> None:
        self._told = time.monotonic()
        spent = self._told - self._started
        done = self.counts.rows - self._first
        left = spent / done * (self.rows - self.counts.rows) if done else 0.0
        fields: dict[str, Any] = {"rows": self.counts.rows, "of": self.rows, "failed": self.counts.failed}
        fields |= {"images_per_second": round(self._pace, 3), "seconds_left": round(left)}
        LOG.tell("progress", f"{self.counts.rows}/{self.rows} rows, {self._rate()}, {left:.0f} s left", **fields)


def _tell(counts: dict[str, Any]) -> None:
    """The shard, and those of its rows that failed, where someone reads events."""
    shard = counts["shard"]
    for failure in counts["failures"]:
        LOG.tell("row_failed", level="warning", shard=shard, **failure)
    seconds = {stage: round(counts[f"{stage}_span"]["seconds"], 3) for stage in STAGES}
    LOG.tell("shard", shard=shard, seconds=seconds, **{name: counts[name] for name in ("rows", "failed", "images", "bytes")})
