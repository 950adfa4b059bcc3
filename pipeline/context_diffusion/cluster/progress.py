"""Progress on stderr: a bar in a terminal, otherwise a line now and then; in the JSON format also each shard
and failed row."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.core.records import Counts
from context_diffusion.core.schema import COUNTED, STAGES

EVERY_SECONDS = 10.0


class RunProgress:
    """Counts and reports what a run writes, while it is entered.

    rows: of the whole job; before: the counts of earlier runs; logs: where Ray writes its logs."""

    def __init__(self, rows: int, before: Counts, logs: str) -> None:
        self.counts = Counts(before.rows, before.ok, before.failed, before.images, dict(before.codes))
        self.rows = rows
        self._rows_before = before.rows
        self._logs = logs
        self._images = 0
        self._started = time.monotonic()
        self._reported = self._started
        self._reported_rows = before.rows
        self._first: tuple[float, int] | None = (
            None  # the time of this run's first shard, the rows until then
        )
        self._sums = dict.fromkeys(COUNTED, 0.0)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        text = f"{self.rows} rows, {self._rows_before} done before; Ray's logs: {self._logs}"
        LOG.emit("started", text, rows=self.rows, done=self._rows_before, logs=self._logs)
        if LOG.is_terminal and LOG.format == LogFormat.TEXT:
            rate = TextColumn("{task.fields[rate]}")
            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=LOG.console
            )
            self._bar.start()
            self._task = self._bar.add_task("rows", total=self.rows, completed=self._rows_before, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self.counts.rows > self._reported_rows:
            self._report()

    def add(self, counts: dict[str, Any]) -> None:
        """Add a written shard, given as a row of schema.WRITTEN."""
        self.counts.rows += counts["rows"]
        self.counts.failed += counts["failed"]
        self.counts.images += counts["images"]
        self.counts.ok = self.counts.rows - self.counts.failed
        for code, failed in counts["codes"]:
            self.counts.codes[code] = self.counts.codes.get(code, 0) + failed
        _emit_shard(counts)
        for name in COUNTED:
            self._sums[name] += counts[name]
        self._images += counts["images_made"]
        self._first = self._first or (time.monotonic(), self.counts.rows)
        if self._bar:
            self._bar.update(self._task, completed=self.counts.rows, rate=self._rate())
        elif time.monotonic() - self._reported > EVERY_SECONDS:
            self._report()

    @property
    def occupancy(self) -> float | None:
        """Return the share of the model's lane steps in this run that rows used; None without model calls."""
        used, paid = (self._sums[name] for name in COUNTED)
        return round(used / paid, 4) if paid else None

    @property
    def _images_per_second(self) -> float:
        return self._images / max(time.monotonic() - self._started, 1e-6)

    def _rate(self) -> str:
        return f"{self._images_per_second:.2f} images/s, {self.counts.failed} failed"

    def _report(self) -> None:
        """Write a line of progress."""
        self._reported = time.monotonic()
        self._reported_rows = self.counts.rows
        left = self._seconds_left()
        fields: dict[str, Any] = {"rows": self.counts.rows, "of": self.rows, "failed": self.counts.failed}
        fields["images_per_second"] = round(self._images_per_second, 3)
        text = f"{self.counts.rows}/{self.rows} rows, {self._rate()}"
        if left is not None:
            fields["seconds_left"] = left
            text += f", {left} s left"
        LOG.emit("progress", text, **fields)

    def _seconds_left(self) -> int | None:
        """Return the time that the other rows take at the pace since the first shard, without the engines'
        start; None until there is a second one."""
        since, rows = self._first or (self._started, self.counts.rows)
        done = self.counts.rows - rows
        return round((time.monotonic() - since) / done * (self.rows - self.counts.rows)) if done else None


def _emit_shard(counts: dict[str, Any]) -> None:
    """Write the JSON events of a shard and of its failed rows."""
    shard = counts["shard"]
    for failure in counts["failures"]:
        LOG.emit("row_failed", level="warning", shard=shard, **failure)
    seconds = {stage: round(counts[f"{stage}_span"]["seconds"], 3) for stage in STAGES}
    fields = {name: counts[name] for name in ("rows", "failed", "images", "bytes")}
    LOG.emit("shard", shard=shard, seconds=seconds, **fields)
