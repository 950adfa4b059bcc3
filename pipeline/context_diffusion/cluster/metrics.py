"""A run's metrics, by Ray's own: the driver counts what was written, the ledger what begins, each engine tells of itself.

Every node's metrics port shows them to Prometheus, under the names that `exported` gives. All carry the label `output`:
`job` is what Prometheus calls its own jobs.
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
from context_diffusion.core.schema import STAGES

PREFIX = "context_diffusion_"
LOOK_S = 5.0  # between two looks at an engine


@dataclass(frozen=True)
class Metric:
    """kind: Counter or Gauge. labels: beside `output`."""

    kind: Any
    what: str
    labels: tuple[str, ...] = ()


METRICS = {
    "rows": Metric(Counter, "rows that were written, as ok or failed", ("status",)),
    "failed_rows": Metric(Counter, "failed rows, by the code in data/", ("code",)),
    "images": Metric(Counter, "pictures that were written"),
    "shards": Metric(Counter, "shards that were written"),
    "attempts": Metric(Counter, "shards that an engine began, for the first time or again", ("attempt",)),
    "written_bytes": Metric(Counter, "parts and their pictures"),
    "stage_seconds": Metric(Counter, "that shards spent in load, generate (waiting for lanes too) and write", ("stage",)),
    "used_lane_steps": Metric(Counter, "lanes that rows used, over all steps"),
    "paid_lane_steps": Metric(Counter, "lanes that the model's calls had; used / paid is the occupancy"),
    "rows_left": Metric(Gauge, "rows still to be written; gone when the driver is"),
    "engine_rows": Metric(Gauge, "rows that an engine has in its lanes or waiting", ("engine",)),
    "cache_hits": Metric(Counter, "encoded prompts, contexts, control maps that an engine had already", ("engine", "kind")),
    "cache_misses": Metric(Counter, "those that it had to encode", ("engine", "kind")),
    "gpu_memory_bytes": Metric(Gauge, "that an engine's torch has reserved; on GPUs alone", ("engine",)),
}


def exported(name: str) -> str:
    """What Prometheus calls it."""
    return f"ray_{PREFIX}{name}{'_total' if METRICS[name].kind is Counter else ''}"


class Metrics:
    """Those of one process. common: labels that all of its values have."""

    def __init__(self, *names: str, **common: str) -> None:
        self._known: dict[str, Any] = {}
        for name in names:
            metric = METRICS[name]
            self._known[name] = metric.kind(PREFIX + name, metric.what, ("output", *metric.labels))
            self._known[name].set_default_tags(_ascii(common))

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        if value > 0:
            self._record(name, "inc", value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._record(name, "set", value, labels)

    def _record(self, name: str, how: str, value: float, labels: dict[str, str]) -> None:
        """Record a value. A metric that Ray refuses is missed, and the run goes on."""
        try:
            getattr(self._known[name], how)(value, _ascii(labels))
        except Exception as error:
            logging.getLogger(__name__).warning("the metric %s was not recorded: %r", name, error)


def _ascii(labels: dict[str, str]) -> dict[str, str]:
    """Ray's labels are ASCII; other characters become escapes: jos\\xe9."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


def _repeat(look: Callable[[], None], until: threading.Event) -> None:
    """Every LOOK_S, from a thread of its own. Ray forgets a gauge that nobody sets for 20 s."""

    def loop() -> None:
        look()
        while not until.wait(LOOK_S):
            look()

    threading.Thread(target=loop, name="metrics", daemon=True).start()


class RunMetrics(Metrics):
    """The driver's, while it is entered. left: rows to be written."""

    def __init__(self, output: str, left: int) -> None:
        counted = ("rows", "failed_rows", "images", "shards", "written_bytes", "stage_seconds")
        super().__init__(*counted, "used_lane_steps", "paid_lane_steps", "rows_left", output=output)
        self.left, self._over = left, threading.Event()

    def __enter__(self) -> Self:
        _repeat(lambda: self.set("rows_left", self.left), self._over)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def add(self, counts: dict[str, Any]) -> None:
        """A written shard: a row of schema.WRITTEN."""
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
        for name in ("used_lane_steps", "paid_lane_steps"):
            self.count(name, counts[name])


class EngineMetrics(Metrics):
    """An engine's, looked at as long as the process lives. engine: its label."""

    def __init__(self, stats: Callable[[], EngineStats], output: str, engine: str) -> None:
        super().__init__("engine_rows", "cache_hits", "cache_misses", "gpu_memory_bytes", output=output, engine=engine)
        self.stats, self._told = stats, collections.Counter[tuple[str, str]]()
        self._looking = threading.Lock()
        _repeat(self.look, threading.Event())

    def look(self) -> None:
        """May be called from any thread."""
        with self._looking:
            now = self.stats()
            self.set("engine_rows", now.rows)
            if now.gpu_bytes is not None:
                self.set("gpu_memory_bytes", now.gpu_bytes)
            for name, counted in (("cache_hits", now.hits), ("cache_misses", now.misses)):
                for kind, count in counted.items():
                    self.count(name, count - self._told[name, kind], kind=kind)
                    self._told[name, kind] = count
