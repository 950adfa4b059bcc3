"""A chunk: rows of one shape group that share the calls of the model, and the sizes that chunks may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.lane_buffers import LaneBuffers
from context_diffusion.engine.rows import Row, State
from context_diffusion.engine.step import Captures, Stepper, Variant

GROWTH = 256  # steps without running out of memory after which chunks may be larger again


class ChunkSizes:
    """The lanes of a chunk, from a table by model and kind of device, since they decide the bits.

    table: the first size is the usual one; larger ones are for rows with more lanes. After running out of
    memory smaller ones are used, for a while.
    """

    def __init__(self, table: Sequence[int]) -> None:
        self.table = tuple(table)
        self.limit = self.table[0]
        self._pause, self._left = GROWTH, 0

    def of(self, lanes: int) -> int:
        """Return the size of a chunk for a row of so many lanes. Raises RowError if the table has none."""
        fitting = [size for size in self.table if size >= lanes]
        if not fitting:
            raise RowError(
                ErrorCode.ENGINE_ERROR,
                f"the row has {lanes} guidance branches, more than the {max(self.table)} lanes of a chunk",
            )
        return max([size for size in fitting if size <= self.limit], default=min(fitting))

    def shrink(self, size: int) -> None:
        """Use smaller chunks than `size`, if there are any."""
        self.limit = max([smaller for smaller in self.table if smaller < size], default=min(self.table))
        self._left, self._pause = self._pause, 2 * self._pause  # each failure makes the next try rarer

    def stepped(self) -> bool:
        """Count a step that fitted. Returns whether chunks may be one size larger from now on."""
        if self.limit == self.table[0]:
            return False
        self._left -= 1
        if self._left > 0:
            return False
        self.limit = min(size for size in self.table if size > self.limit)
        self._left = self._pause
        return True


class Chunk:
    """Places for lanes of rows of one group. Its buffers are made for the first row.

    closed: takes no more rows."""

    def __init__(
        self, group: Hashable, size: int, backbone: Backbone, device: torch.device, captures: Captures
    ) -> None:
        self.group, self.size, self.closed = group, size, False
        self.rows: dict[Row, list[int]] = {}
        self._backbone, self._device, self._captures = backbone, device, captures
        self._stepper: Stepper | None = None

    @property
    def used(self) -> int:
        return sum(row.lanes for row in self.rows)

    @property
    def free(self) -> int:
        return self.size - self.used

    def place(self, row: Row) -> None:
        """Write a prepared row to the lowest free places. The caller knows that it fits."""
        if self._stepper is None:
            buffers = LaneBuffers(row.ready, self.size, self._device)
            self._stepper = Stepper(self._backbone, buffers, self.group, self._captures)
        taken = {place for places in self.rows.values() for place in places}
        places = [place for place in range(self.size) if place not in taken][: row.lanes]
        if self._stepper.buffers.fit(row):
            self._stepper.forget()
        self._stepper.buffers.write(row, places)
        self.rows[row] = places
        row.state = State.PLACED
        # Its tensors lie in the buffers now.
        written = dataclasses.replace(row.ready.encoded, lanes=[], control=None)
        row.prepared = dataclasses.replace(row.ready, encoded=written, noise=None)

    def step(self) -> None:
        """Move each row one step on."""
        assert self._stepper is not None, "a chunk without rows does not step"
        controlled = any(row.ready.window[row.step] for row in self.rows)
        rescaled = any(row.guidance_rescale for row in self.rows)
        self._stepper(Variant(controlled, rescaled))
        for row in self.rows:
            row.step += 1

    def state(self, row: Row) -> tuple[Tensor, Tensor]:
        """Return copies (1, ...) of a row's latents and x0."""
        assert self._stepper is not None, "the row has been placed"
        buffers, place = self._stepper.buffers, self.rows[row][0]
        return buffers.latents[place : place + 1].clone(), buffers.x0[place : place + 1].clone()

    def remove(self, row: Row) -> None:
        """Free a row's places; does nothing for a row that is not here."""
        places = self.rows.pop(row, None)
        if places and self._stepper:
            self._stepper.buffers.clear(places)


@dataclasses.dataclass
class Occupancy:
    """Lane steps: those that rows used, and those that calls of the model had room for."""

    used: int = 0
    paid: int = 0
    steps: int = 0

    @property
    def share(self) -> float:
        return self.used / self.paid if self.paid else 1.0

    def charge(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Count a step of chunks, and charge their rows with their shares of what it cost."""
        used = sum(chunk.used for chunk in chunks)
        self.steps += 1
        self.used += used
        self.paid += sum(chunk.size for chunk in chunks)
        for chunk in chunks:
            for row in chunk.rows:
                row.used += row.lanes
                row.paid += chunk.size * row.lanes / chunk.used
                row.seconds += seconds * row.lanes / used
