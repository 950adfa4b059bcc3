"""One pass over an OUTPUT's narrow columns: which rows stand on the page, and how the scores of all of them lie.

An even sample, the worst and the best by each score, some failures of each code. Of a part only the columns in NARROW are
read, and of all parts only what may still be chosen is held.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from context_diffusion.core.schema import ID, SCORE_COLUMNS
from context_diffusion.outputs.output_folder import Output

EVEN, EXTREME, FAILED = 120, 10, 8  # rows at even distances; the worst and the best of each score; of each error code
BINS = 20  # of a histogram, over 0 to 1
NARROW = [ID, "index", "status", "error_code", *SCORE_COLUMNS]
Place = tuple[int, int]  # shard, row of its part


@dataclass
class Score:
    """What is known of a score: how many pictures in each bin, their sum, and its ends."""

    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    worst: list[tuple[float, Place]] = field(default_factory=list)
    best: list[tuple[float, Place]] = field(default_factory=list)

    def add(self, shard: int, values: NDArray[np.float64]) -> None:
        """values: of a part's rows, NaN where there is none."""
        rows = np.flatnonzero(np.isfinite(values))
        if not len(rows):
            return
        there = values[rows]
        self.bins += np.histogram(np.clip(there, 0, 1), BINS, (0, 1))[0]
        self.total += float(there.sum())
        order = rows[np.argsort(there, kind="stable")]
        ends = [[(float(values[row]), (shard, int(row))) for row in some] for some in (order[:EXTREME], order[-EXTREME:])]
        self.worst = sorted(self.worst + ends[0])[:EXTREME]
        self.best = sorted(self.best + ends[1])[-EXTREME:]

    def told(self, name: str) -> dict[str, Any]:
        count = int(self.bins.sum())
        return {"name": name, "count": count, "mean": self.total / count, "bins": self.bins.tolist()}


@dataclass
class Survey:
    """scores: by column, those alone that some row has. even, failures: places of rows."""

    scores: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    even: list[Place] = field(default_factory=list)
    failures: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    rows: int = 0

    @property
    def places(self) -> list[Place]:
        """All that were chosen, in OUTPUT's order."""
        ends = [place for score in self.scores.values() for _, place in (*score.worst, *score.best)]
        return sorted({*self.even, *ends, *(place for some in self.failures.values() for place in some)})

    @property
    def histograms(self) -> list[dict[str, Any]]:
        return [score.told(name) for name, score in self.scores.items() if score.bins.any()]


def survey(output: Output, images: int) -> Survey:
    """images: how many OUTPUT has, so that one pass is enough."""
    found, seen = Survey(), 0
    wanted = np.unique(((np.arange(EVEN) + 0.5) * images / EVEN).astype(np.int64))
    for shard, part in output.read_parts(NARROW):
        made = np.flatnonzero(np.asarray(part["status"].to_pylist()) == "ok")
        first, last = np.searchsorted(wanted, (seen, seen + len(made)))
        found.even += [(shard, int(made[number - seen])) for number in wanted[first:last]]
        seen, found.rows = seen + len(made), found.rows + len(part)
        for name in SCORE_COLUMNS:
            if name in part.column_names and part[name].null_count < len(part):
                found.scores[name].add(shard, part[name].cast(pa.float64()).to_numpy())
        if len(made) < len(part):
            _add_failures(found, shard, part["error_code"].to_pylist())
    return found


def _add_failures(found: Survey, shard: int, codes: list[str | None]) -> None:
    for row, code in enumerate(codes):
        if code is not None and len(found.failures[code]) < FAILED:
            found.failures[code].append((shard, row))
