"""Metrics of a run, exported by Ray: the driver counts what is written, the ledger what starts, and each
engine its own statistics.

Every node's metrics port has them for Prometheus, under the names that `exported` returns. All have the label
`output`, since Prometheus uses the label `job` itself.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from ray.util.metrics import Counter, Gauge

from context_diffusion.core.records import EngineStats
from context_diffusion.core.schema import COUNTED, STAGES

PREFIX = "context_diffusion_"
REFRESH_S = 5.0  # between two updates of the gauges; Ray drops a gauge that is not set for 20 s


@dataclass(frozen=True)
class Metric:
    """A metric. kind: Counter or Gauge; labels: those besides `output`."""

    kind: Any
    description: str
    labels: tuple[str, ...] = ()


METRICS = {
    "rows": Metric(Counter, "rows written, as ok or failed", ("status",)),
    "failed_rows": Metric(Counter, "failed rows, by the code in data/", ("code",)),
    "images": Metric(Counter, "images written"),
    "shards": Metric(Counter, "shards written"),
    "attempts": Metric(Counter, "shards that an engine started, for the first time or again", ("attempt",)),
    "written_bytes": Metric(Counter, "bytes of parts and their images"),
    "stage_seconds": Metric(
        Counter, "seconds of shards in load, generate (with the wait for lanes) and write", ("stage",)
    ),
    "used_lane_steps": Metric(Counter, "lanes that rows used, summed over all steps"),
    "paid_lane_steps": Metric(Counter, "lanes of the model's calls; used / paid is the occupancy"),
    "rows_left": Metric(Gauge, "rows still to be written; absent when the driver has ended"),
    "engine_rows": Metric(Gauge, "rows that an engine has in its lanes or waiting", ("engine",)),
    "cache_hits": Metric(
        Counter, "encoded prompts, contexts and control maps that an engine had cached", ("engine", "kind")
    ),
    "cache_misses": Metric(Counter, "those that an engine had to encode", ("engine", "kind")),
    "gpu_memory_bytes": Metric(
        Gauge, "memory that an engine's torch has reserved; on GPUs only", ("engine",)
    ),
}


def exported(name: str) -> str:
    """Return a metric's name in Prometheus."""
    return f"ray_{PREFIX}{name}{'_total' if METRICS[name].kind is Counter else ''}"


class Metrics:
    """The metrics of one process. common: labels of all values."""

    def __init__(self, *names: str, **common: str) -> None:
        self._metrics: dict[str, Any] = {}
        for name in names:
            metric = METRICS[name]
            self._metrics[name] = metric.kind(PREFIX + name, metric.description, ("output", *metric.labels))
            self._metrics[name].set_default_tags(_ascii(common))

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add a value to a counter."""
        if value > 0:
            self._record(name, "inc", value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._record(name, "set", value, labels)

    def _record(self, name: str, method: str, value: float, labels: dict[str, str]) -> None:
        """Record a value. An error of Ray is logged, so that it does not end the run."""
        try:
            getattr(self._metrics[name], method)(value, _ascii(labels))
        except Exception as error:
            logging.getLogger(__name__).warning("the metric %s was not recorded: %r", name, error)


def _ascii(labels: dict[str, str]) -> dict[str, str]:
    """Escape other characters than ASCII, which Ray's labels do not allow: jos\\xe9."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


def _repeat(action: Callable[[], None], until: threading.Event) -> None:
    """Run an action now and every REFRESH_S seconds, in a thread."""

    def loop() -> None:
        action()
        while not until.wait(REFRESH_S):
            action()

    threading.Thread(target=loop, name="metrics", daemon=True).start()


class RunMetrics(Metrics):
    """The metrics of the driver, while it is entered. left: rows to be written."""

    def __init__(self, output: str, left: int) -> None:
        of_shards = ("rows", "failed_rows", "images", "shards", "written_bytes", "stage_seconds", *COUNTED)
        super().__init__(*of_shards, "rows_left", output=output)
        self.left = left
        self._over = threading.Event()

    def __enter__(self) -> Self:
        _repeat(lambda: self.set("rows_left", self.left), self._over)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def add(self, counts: dict[str, Any]) -> None:
        """Count a written shard, given as a row of schema.WRITTEN."""
        self.left -= counts["rows"]
        self.count("rows", counts["rows_made"] - counts["failed"], status="ok")
        self.count("rows", counts["failed"], status="failed")
        for code, failed in counts["codes"]:
            self.count("failed_rows", failed, code=code)
        self.count("images", counts["images_made"])
        self.count("shards")
        self.count("written_bytes", counts["bytes"])
        for stage in STAGES:
            self.count("stage_seconds", counts[f"{stage}_span"]["seconds"], stage=stage)
        for name in COUNTED:
            self.count(name, counts[name])


class EngineMetrics(Metrics):
    """The metrics of an engine, updated as long as its process lives.

    engine: its label. on_progress: called when it has made steps, so that a long shard is not taken for a
    stall."""

    def __init__(
        self, stats: Callable[[], EngineStats], output: str, engine: str, on_progress: Callable[[], None]
    ) -> None:
        names = ("engine_rows", "cache_hits", "cache_misses", "gpu_memory_bytes")
        super().__init__(*names, output=output, engine=engine)
        self.stats, self._on_progress = stats, on_progress
        self._steps = 0
        self._counted = collections.Counter[tuple[str, str]]()
        self._lock = threading.Lock()
        _repeat(self.update, threading.Event())

    def update(self) -> None:
        """Record the engine's current statistics. May be called from any thread."""
        with self._lock:
            stats = self.stats()
            self.set("engine_rows", stats.rows)
            if stats.steps != self._steps:
                self._steps = stats.steps
                self._on_progress()
            if stats.gpu_bytes is not None:
                self.set("gpu_memory_bytes", stats.gpu_bytes)
            for name, counts in (("cache_hits", stats.hits), ("cache_misses", stats.misses)):
                for kind, count in counts.items():
                    self.count(name, count - self._counted[name, kind], kind=kind)
                    self._counted[name, kind] = count
