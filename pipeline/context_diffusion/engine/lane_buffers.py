"""The buffers of a chunk: all that a step reads, at fixed places on the device, for rows of one shape group.

A row takes a place for each of its lanes; its own state lies at the first of them. Buffers are written when a
row is placed, so that a step allocates nothing on the host and copies nothing to the device.

P places  S steps of the longest table that fits
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Conditions
from context_diffusion.engine.rows import Prepared, Row

BRANCHES = 3  # lanes of a row, at most
LEAST_STEPS = 64  # of a table; longer ones take twice as much until they fit


class LaneBuffers:
    """Buffers for `places` lanes. The first row says the shapes of all.

    latents, x0: (P, ...) float32, of a row, at its first place; x0 is that of the step before. step: (P,)
    int64. active: (P,), 1 at the first place of each row, else 0. tables: (P, S, ...), see Prepared. noise:
    (P, S, ...); None: no row needs any. row_of_lane: (P,) the first place of each lane's row. lanes_of_row,
    weights: (P, BRANCHES), the places of a row's lanes and their weights in the guided sum. last_lane: (P,)
    the place of a row's last lane, which has its prompt and contexts. rescale: (P,) guidance_rescale. lanes,
    control: what `Backbone.predict` reads.
    """

    def __init__(self, first: Prepared, places: int, device: torch.device) -> None:
        self.device = device
        self.places = torch.arange(places, device=device)
        self.latents = torch.zeros(places, *first.latents.shape[1:], device=device)
        self.x0 = torch.zeros_like(self.latents)
        self.step = torch.zeros(places, dtype=torch.int64, device=device)
        self.active = torch.zeros(places, dtype=torch.int64, device=device)
        self.tables = torch.zeros(places, LEAST_STEPS, first.table.shape[1], device=device)
        self.noise: Tensor | None = None
        self.row_of_lane = self.places.clone()
        self.lanes_of_row = self.places[:, None].repeat(1, BRANCHES)
        self.weights = torch.zeros(places, BRANCHES, device=device)
        self.last_lane = self.places.clone()
        self.rescale = torch.zeros(places, device=device)
        self.lanes = _empty(first.encoded.lanes[0], places)
        self.control: Conditions | None = None

    def fit(self, row: Row) -> bool:
        """Make room for a row's table, noise and control maps. Returns whether any buffer is a new one."""
        ready, before = row.ready, (self.tables, self.noise, self.control)
        steps = self.tables.shape[1]
        while steps < row.steps:
            steps *= 2
        if steps > self.tables.shape[1]:
            self.tables = _longer(self.tables, steps)
            self.noise = None if self.noise is None else _longer(self.noise, steps)
        if ready.noise is not None and self.noise is None:
            self.noise = self.latents.new_zeros(len(self.places), steps, *self.latents.shape[1:])
        if ready.encoded.control is not None and self.control is None:
            self.control = _empty(ready.encoded.control, len(self.places))
        return any(
            now is not old for now, old in zip((self.tables, self.noise, self.control), before, strict=True)
        )

    def write(self, row: Row, places: list[int]) -> None:
        """Write a prepared row to its places, one for each of its lanes."""
        ready, first = row.ready, places[0]
        for number in range(BRANCHES):
            present = number < len(places)
            # An absent branch reads the row's own lane with weight 0, never a neighbour's.
            self.lanes_of_row[first, number] = places[number] if present else first
            self.weights[first, number] = row.branches[number].weight if present else 0.0
        self.last_lane[first] = places[-1]
        self.rescale[first] = row.guidance_rescale
        for place, conditions in zip(places, ready.encoded.lanes, strict=True):
            self.row_of_lane[place] = first
            _write(self.lanes, place, conditions)
        if ready.encoded.control is not None:
            assert self.control is not None, "fit() is called first"
            _write(self.control, first, ready.encoded.control)
        self.tables[first, : row.steps] = pinned(ready.table, self.device)
        if ready.noise is not None:
            assert self.noise is not None, "fit() is called first"
            self.noise[first, : row.steps] = pinned(ready.noise, self.device)
        self.latents[first] = pinned(ready.latents, self.device)[0]
        self.x0[first] = 0
        self.step[first] = 0
        self.active[first] = 1

    def clear(self, places: list[int]) -> None:
        """Free a row's places."""
        first = places[0]
        self.active[first] = 0
        self.step[first] = 0
        self.rescale[first] = 0
        self.tables[first] = 0
        self.latents[first] = 0
        for place in places:
            self.row_of_lane[place] = place


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Copy values of the host to the device, without waiting for it on a GPU."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _leaves(conditions: Conditions) -> Iterator[Tensor]:
    for value in conditions.values():
        yield from (value,) if isinstance(value, Tensor) else value


def _empty(conditions: Conditions, places: int) -> Conditions:
    """Return buffers (P, ...) of zeros for conditions (1, ...), by the same names."""

    def buffer(value: Tensor) -> Tensor:
        buffer = value.new_zeros(places, *value.shape[1:])
        if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
            return buffer.contiguous(memory_format=torch.channels_last)  # as the networks' own activations
        return buffer

    return {
        name: buffer(value) if isinstance(value, Tensor) else tuple(map(buffer, value))
        for name, value in conditions.items()
    }


def _write(buffers: Conditions, place: int, conditions: Conditions) -> None:
    for buffer, value in zip(_leaves(buffers), _leaves(conditions), strict=True):
        buffer[place].copy_(value[0], non_blocking=True)


def _longer(table: Tensor, steps: int) -> Tensor:
    longer = table.new_zeros(table.shape[0], steps, *table.shape[2:])
    longer[:, : table.shape[1]] = table
    return longer
