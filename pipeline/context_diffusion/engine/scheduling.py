"""Which chunks go one step on, and which rows they take. Knows rows and chunks by their numbers alone.

Full chunks go first, so that few lanes are empty; and the oldest row at hand is passed over for a bounded
number of steps, so that a row of a rare size is not left until the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from context_diffusion.engine.chunk import Chunk
from context_diffusion.engine.rows import Row

WINDOW = 64  # waiting rows of a group that are looked at


@dataclass(frozen=True)
class Option:
    """A chunk that could advance, or be opened. chunk: None for one to open, for rows of `group` in `size`
    lanes. fill: share of its lanes that would be used. oldest: the order of its oldest row. recent: it went
    on in the step before."""

    group: Hashable
    size: int
    chunk: Chunk | None
    fill: float
    oldest: int
    recent: bool = False


def options_of(
    chunks: Sequence[Chunk], unplaced: Iterable[Row], recent: Sequence[Chunk], count: int
) -> list[Option]:
    """Return the chunks with rows, and of each group up to `count` that could be opened for rows that have no
    place."""
    waiting: dict[tuple[Hashable, int], list[Row]] = defaultdict(list)
    for row in unplaced:
        waiting[row.group, row.size].append(row)
    options = []
    for chunk in chunks:
        taken = [] if chunk.closed else _taken(waiting[chunk.group, chunk.size], chunk.free)
        rows = [*chunk.rows, *taken]
        if rows:
            options.append(_option(chunk.group, chunk.size, chunk, rows, chunk in recent))
    for (group, size), rows in waiting.items():
        for _ in range(count):
            if rows:
                options.append(_option(group, size, None, _taken(rows, size)))
    return options


def _taken(rows: list[Row], room: int) -> list[Row]:
    """Take the rows that fit into `room` lanes out of a list."""
    numbers = fitting([row.lanes for row in rows[:WINDOW]], room)
    taken = [rows[number] for number in numbers]
    for number in reversed(numbers):
        del rows[number]
    return taken


def _option(group: Hashable, size: int, chunk: Chunk | None, rows: list[Row], recent: bool = False) -> Option:
    fill = sum(row.lanes for row in rows) / size
    return Option(group, size, chunk, fill, min(row.order for row in rows), recent)


def choose(options: Iterable[Option], count: int, overdue: int | None) -> list[Option]:
    """Return up to `count` options: the one with the overdue row, then the fullest, and among equally full
    ones those that are open and advanced before, so that few are begun at once."""

    def rank(option: Option) -> tuple[bool, float, bool, bool, int]:
        return option.oldest == overdue, option.fill, option.recent, option.chunk is not None, -option.oldest

    return sorted(options, key=rank, reverse=True)[:count]


def fitting(lanes: Sequence[int], room: int, in_order: bool = False) -> list[int]:
    """Return the numbers of the rows that are taken into `room` lanes, given each row's lanes: those that
    fill the most of it, and of such choices the one with the first rows; in order: none after the first that
    does not fit."""
    if in_order:
        totals = list(accumulate(lanes))
        return [number for number, total in enumerate(totals) if total <= room]
    lanes = lanes[:WINDOW]
    # Bit s of sums[i]: some of the rows from i on have s lanes together.
    sums = [1] * (len(lanes) + 1)
    for number in range(len(lanes) - 1, -1, -1):
        sums[number] = sums[number + 1] | sums[number + 1] << lanes[number]
    left = max((total for total in range(room + 1) if sums[0] >> total & 1), default=0)
    taken = []
    for number, needed in enumerate(lanes):
        if needed <= left and sums[number + 1] >> (left - needed) & 1:
            taken.append(number)
            left -= needed
    return taken


class Patience:
    """Counts the steps for which the oldest row at hand is passed over. limit: when it is overdue. longest:
    the most so far."""

    def __init__(self, limit: int) -> None:
        self.limit, self.longest = limit, 0
        self._oldest: int | None = None
        self._waited = 0

    def overdue(self, oldest: int | None) -> int | None:
        """Return the oldest row's order if it must advance now, until it is finished."""
        if oldest != self._oldest:
            self._oldest, self._waited = oldest, 0
        return oldest if self._waited >= self.limit else None

    def stepped(self, advanced: bool) -> None:
        """Count a step, in which the oldest row advanced or did not."""
        if not advanced:
            self._waited += 1
            self.longest = max(self.longest, self._waited)
        elif self._waited < self.limit:
            self._waited = 0
