"""Chooses the rows of a report and collects the score statistics of all rows, in one pass over the parts.

The sample holds rows at even distances, the worst and the best rows by each score, and some failed rows of
each error code. Only the columns in SAMPLED are read, and only rows that may still be chosen are held in
memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from context_diffusion.core.schema import ID, SCORE_COLUMNS
from context_diffusion.outputs.output_folder import Output

EVEN = 120  # rows at even distances
EXTREME = 10  # the worst, and as many of the best, by each score
FAILED = 8  # rows of each error code
BINS = 20  # of a histogram, over 0 to 1
SAMPLED = [ID, "index", "status", "error_code", "created_at", *SCORE_COLUMNS]
Position = tuple[int, int]  # shard, number of the row in its part


@dataclass
class ScoreStatistics:
    """The histogram, the sum and the extreme rows of one score."""

    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    worst: list[tuple[float, Position]] = field(default_factory=list)
    best: list[tuple[float, Position]] = field(default_factory=list)

    def add(self, shard: int, column: NDArray[np.float64]) -> None:
        """Add the values of a part's rows; NaN for rows without a score."""
        rows = np.flatnonzero(np.isfinite(column))
        if not len(rows):
            return
        values = column[rows]
        self.bins += np.histogram(np.clip(values, 0, 1), BINS, (0, 1))[0]
        self.total += float(values.sum())
        ascending = rows[np.argsort(values, kind="stable")]
        worst = [(float(column[row]), (shard, int(row))) for row in ascending[:EXTREME]]
        best = [(float(column[row]), (shard, int(row))) for row in ascending[-EXTREME:]]
        self.worst = sorted(self.worst + worst)[:EXTREME]
        self.best = sorted(self.best + best)[-EXTREME:]

    def histogram(self, name: str) -> dict[str, Any]:
        """Return the histogram as the page shows it."""
        count = int(self.bins.sum())
        return {"name": name, "count": count, "mean": self.total / count, "bins": self.bins.tolist()}


@dataclass
class RowSample:
    """The chosen rows.

    scores: by column, only those that some row has; failures: by error code; rows: of OUTPUT; last_image:
    when it was generated.
    """

    scores: dict[str, ScoreStatistics] = field(default_factory=lambda: defaultdict(ScoreStatistics))
    even: list[Position] = field(default_factory=list)
    failures: dict[str, list[Position]] = field(default_factory=lambda: defaultdict(list))
    rows: int = 0
    last_image: datetime | None = None

    @property
    def positions(self) -> list[Position]:
        """All chosen rows, in OUTPUT's order."""
        extreme = [position for score in self.scores.values() for _, position in (*score.worst, *score.best)]
        failed = [position for positions in self.failures.values() for position in positions]
        return sorted({*self.even, *extreme, *failed})

    @property
    def histograms(self) -> list[dict[str, Any]]:
        return [score.histogram(name) for name, score in self.scores.items() if score.bins.any()]


def sample_rows(output: Output, images: int) -> RowSample:
    """Choose the rows of a report. images: the number of images in OUTPUT, so that one pass is enough."""
    sample = RowSample()
    chosen = np.unique(((np.arange(EVEN) + 0.5) * images / EVEN).astype(np.int64))  # numbers of images
    seen = 0
    for shard, part in output.read_parts(SAMPLED):
        rows = np.flatnonzero(np.asarray(part["status"].to_pylist()) == "ok")
        first, last = np.searchsorted(chosen, (seen, seen + len(rows)))
        sample.even += [(shard, int(rows[number - seen])) for number in chosen[first:last]]
        seen += len(rows)
        sample.rows += len(part)
        if (latest := pc.max(part["created_at"]).as_py()) is not None:
            sample.last_image = max(latest, sample.last_image or latest)
        for name in SCORE_COLUMNS:
            if name in part.column_names and part[name].null_count < len(part):
                sample.scores[name].add(shard, part[name].cast(pa.float64()).to_numpy())
        if len(rows) < len(part):
            _add_failures(sample, shard, part["error_code"].to_pylist())
    return sample


def _add_failures(sample: RowSample, shard: int, codes: list[str | None]) -> None:
    for row, code in enumerate(codes):
        if code is not None and len(sample.failures[code]) < FAILED:
            sample.failures[code].append((shard, row))
