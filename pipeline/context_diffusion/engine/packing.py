"""Which of the rows at hand go one step on, so that the chunks are full. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence


def choose(lanes: Sequence[int], chunk: int, most: int) -> list[int]:
    """Indices of the rows to advance, given each row's lanes, the most urgent row first, which always goes.

    Of all sums of lanes up to `most` the one that leaves the smallest part of its chunks empty, and of these
    the largest; reached with the most urgent rows that it can be reached with."""
    # Bit s of reach[i]: some of the rows from i on have s lanes together.
    reach = [1] * (len(lanes) + 1)
    for i in range(len(lanes) - 1, -1, -1):
        reach[i] = reach[i + 1] | reach[i + 1] << lanes[i]
    first = lanes[0]
    sums = [first + rest for rest in range(max(most - first, 0) + 1) if reach[1] >> rest & 1]
    left = max(sums, key=lambda total: (total / (-(-total // chunk) * chunk), total)) - first
    chosen = [0]
    for i in range(1, len(lanes)):
        if lanes[i] <= left and reach[i + 1] >> (left - lanes[i]) & 1:
            chosen.append(i)
            left -= lanes[i]
    return chosen
