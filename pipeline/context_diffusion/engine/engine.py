"""The engine: rows in the lanes of chunks, which are full while rows are at hand.

Rows have their own timestep, number of steps, scheduler, guidance, control window and contexts. The model
sees chunks of one fixed shape, so a row's bits don't depend on its neighbours. A row is prepared (encoded),
placed in a chunk of its shape group, moved on step by step, and finished (decoded). Knows nothing of Ray or
files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from context_diffusion.core.records import EngineStats, Failure, Pixels, Request, Result
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.chunk import Chunk, ChunkSizes, Occupancy
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.finishing import Finisher, Finishing, Inline, decoded
from context_diffusion.engine.preparation import Preparation
from context_diffusion.engine.rows import (
    TOO_LARGE,
    Row,
    State,
    StepUpdate,
    failure_of,
    free_memory,
    is_out_of_memory,
)
from context_diffusion.engine.scheduling import Option, Patience, choose, options_of
from context_diffusion.engine.step import Captures, Pace, same_bits

Outcome = tuple[Request, Result | Failure]
CACHE_BYTES = 2**30
MAX_WAIT = 500  # steps for which the oldest row may be passed over
AT_HAND = 1024  # rows that `run` gives to the engine at once


class Engine:
    """Generates images of requests.

    backbone: on its device. sizes: of chunks, in lanes. callback: called after each step of each row. unsafe:
    checks each finished image. threads: calls of the model at once, on a CPU. max_wait: steps for which the
    oldest row at hand may be passed over by rows of fuller chunks. compiled: the backbone's networks are.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: torch.device,
        sizes: Sequence[int],
        *,
        callback: Callable[[StepUpdate], None] | None = None,
        unsafe: Callable[[Pixels], bool] | None = None,
        threads: int = 1,
        max_wait: int = MAX_WAIT,
        compiled: bool = False,
    ) -> None:
        self.backbone, self.device, self.callback = backbone, device, callback
        self.sizes, self.patience = ChunkSizes(sizes), Patience(max_wait)
        self.cache, self.occupancy = Cache(CACHE_BYTES), Occupancy()
        self._on_cpu = device.type == "cpu"
        self.most_chunks = threads if self._on_cpu else 1  # that advance at once
        # Each thread sets its own number of torch's threads: another engine of this process may just have
        # changed it.
        self._pool: Executor = (
            ThreadPoolExecutor(threads, "engine", torch.set_num_threads, (1,)) if self._on_cpu else Inline()
        )
        self.preparation = Preparation(backbone, self.cache, self._pool, ahead=self._on_cpu)
        self.finisher = Finisher(backbone, device, self._pool, unsafe, compiled)
        self._captures, self._pace = Captures(device), Pace(device)
        self.chunks: list[Chunk] = []
        self._rows: dict[int, Row] = {}  # those that have not ended, by their order
        self._order = 0
        self._finishing: dict[Row, Finishing] = {}
        self._failed: list[Outcome] = []
        self._recent: list[Chunk] = []  # that advanced in the step before

    def add(self, request: Request) -> None:
        """Take a request. What is wrong with it is its own outcome."""
        try:
            branches = self.backbone.branches(request)
            group, size = self.backbone.shape_group(request), self.sizes.of(len(branches))
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            self._failed.append((request, failure_of(error)))
        else:
            self._rows[self._order] = Row(request, self._order, group, branches, size)
            self._order += 1

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Free the row's lanes; it has no outcome. Does nothing for a row that has ended."""
        for row in [row for row in self._rows.values() if row.request is request]:
            self._end(row)
        self._failed = [(failed, outcome) for failed, outcome in self._failed if failed is not request]

    @property
    def idle(self) -> bool:
        return not self._rows and not self._failed

    def stats(self) -> EngineStats:
        """Return the statistics. Safe to call from any thread."""
        reserved = None if self._on_cpu else torch.cuda.memory_reserved(self.device)
        hits, misses = dict(self.cache.hits), dict(self.cache.misses)
        return EngineStats(len(self._rows), hits, misses, reserved, self.occupancy.steps)

    def run(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Generate all requests; yield each as it finishes."""
        waiting = iter(requests)
        left = True
        while left or not self.idle:
            while left and len(self._rows) < AT_HAND:
                if (request := next(waiting, None)) is None:
                    left = False
                else:
                    self.add(request)
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """Prepare and place waiting rows, move chunks one step on, and return the rows that ended."""
        with same_bits(self.device):
            ended, self._failed = self._failed, []
            ended += self._collect()
            if chunks := self._choose():
                self._recent = chunks
                return ended + self._advance(chunks)
            under_way: list[Future[Any]] = [
                *self.preparation.futures.values(),
                *(f.future for f in self._finishing.values()),
            ]
            if under_way and not ended:
                wait(under_way, return_when=FIRST_COMPLETED)
            return ended

    def _choose(self) -> list[Chunk]:
        """Choose the chunks that advance; prepare rows for them, and place those that are prepared."""
        overdue = self.patience.overdue(self._oldest)
        options = options_of(self.chunks, self._unplaced(), self._recent, self.most_chunks)
        chosen = [self._chunk(option) for option in choose(options, self.most_chunks, overdue)]
        full = [chunk for chunk in chosen if self._fill(chunk, in_order=overdue is not None)]
        self.chunks = [chunk for chunk in self.chunks if chunk.rows or chunk in chosen]
        return [chunk for chunk in full if chunk.rows]

    def _chunk(self, option: Option) -> Chunk:
        """Return the chunk of an option, opened where it is not."""
        if option.chunk is None:
            key = option.group, option.size
            self.chunks.append(Chunk(*key, self.backbone, self.device, self._captures))
            return self.chunks[-1]
        return option.chunk

    def _fill(self, chunk: Chunk, in_order: bool) -> bool:
        """Place rows in a chunk. Returns whether it waits for none that is being prepared."""
        if chunk.closed:
            return True
        key = chunk.group, chunk.size
        rows = [row for row in self._unplaced() if (row.group, row.size) == key]
        return self.preparation.fill(chunk, rows, self._placed, in_order)

    def _unplaced(self) -> list[Row]:
        return [row for row in self._rows.values() if row.state.value < State.PLACED.value]

    def _advance(self, chunks: list[Chunk]) -> list[Outcome]:
        """Move chunks one step on. Returns the rows that failed for lack of memory."""
        began = perf_counter()
        steps = [self._pool.submit(chunk.step) for chunk in chunks]
        wait(steps)
        errors = [step.exception() for step in steps]
        for error in errors:
            if error is not None and not is_out_of_memory(error):
                raise error
        if any(errors):
            return self._out_of_memory(chunks[[error is not None for error in errors].index(True)])
        oldest = self._oldest
        self.patience.stepped(any(row.order == oldest for chunk in chunks for row in chunk.rows))
        self._pace.stepped()
        self.occupancy.charge(chunks, perf_counter() - began)
        if self.sizes.stepped():
            self._resize(close=True)
        for chunk in chunks:
            for row in list(chunk.rows):
                self._after_step(chunk, row)
        return []

    def _after_step(self, chunk: Chunk, row: Row) -> None:
        if self.callback:

            def preview() -> Pixels:
                with torch.inference_mode():
                    return decoded(self.backbone, row, x0).cpu().numpy()

            x0 = chunk.state(row)[1]
            self.callback(StepUpdate(row.request, row.step, row.steps, preview))
        if row.step == row.steps and row in chunk.rows:  # a callback may have cancelled it
            latents, _ = chunk.state(row)
            chunk.remove(row)
            self._finish(row, latents)

    def _collect(self) -> list[Outcome]:
        """Return the rows that have ended; those that are prepared can be placed."""
        ended = self._collect_prepared()
        for row, finishing in [(row, f) for row, f in self._finishing.items() if f.future.done()]:
            error = finishing.future.exception()
            if error is None:
                self._end(row)
                ended.append((row.request, finishing.future.result()))
            elif is_out_of_memory(error):
                ended += self._decode_again(row, finishing)
            else:
                raise error
        return ended

    def _collect_prepared(self) -> list[Outcome]:
        self.preparation.collect(self._placed)
        failed = self.preparation.take_failed()
        for row, _ in failed:
            self._end(row)
        for row in [row for row in self._rows.values() if row.state == State.PREPARED and not row.steps]:
            # Image to image with a strength that is too small for a step.
            self._finish(row, row.ready.latents)
        return [(row.request, failure) for row, failure in failed]

    def _finish(self, row: Row, latents: Tensor) -> None:
        row.state = State.FINISHING
        self._finishing[row] = self.finisher.start(row, latents)

    @property
    def _oldest(self) -> int | None:
        """The order of the oldest row that still has steps to go."""
        return next((order for order, row in self._rows.items() if row.state != State.FINISHING), None)

    @property
    def _placed(self) -> int:
        return sum(len(chunk.rows) for chunk in self.chunks)

    def _end(self, row: Row) -> None:
        self._rows.pop(row.order, None)
        self.preparation.futures.pop(row, None)
        self._finishing.pop(row, None)
        for chunk in self.chunks:
            chunk.remove(row)

    def _decode_again(self, row: Row, before: Finishing) -> list[Outcome]:
        """Decode a row after the decoder ran out of memory: in tiles, then without rows beside it."""
        free_memory()
        if self.backbone.tiles and not before.tiled:
            self._finishing[row] = self.finisher.start(row, before.latents, tiled=True)
            return []
        if self.chunks:
            self.sizes.shrink(max(chunk.size for chunk in self.chunks))
            self._resize(close=False)
            free_memory()
        alone = self.finisher.start(row, before.latents, before.tiled)
        error = alone.future.exception()  # waits, before other rows take the room
        self._end(row)
        if error is not None and not is_out_of_memory(error):
            raise error
        return [(row.request, TOO_LARGE if error else alone.future.result())]

    def _out_of_memory(self, chunk: Chunk) -> list[Outcome]:
        """Restart all rows after a step of a chunk ran out of memory: in smaller chunks, else in one chunk at
        a time; if neither is possible, the rows of this chunk fail."""
        failed: list[Row] = []
        self.sizes.shrink(chunk.size)
        if all(self.sizes.of(row.lanes) >= chunk.size for row in chunk.rows):
            failed = list(chunk.rows) if len(self.chunks) == 1 else []
            self.most_chunks = 1
        self._resize(close=False)
        free_memory()
        for row in failed:
            self._end(row)
        return [(row.request, TOO_LARGE) for row in failed]

    def _resize(self, close: bool) -> None:
        """Set the present chunk size on rows without a place. close: rows in chunks finish there; else they
        begin again."""
        for chunk in self.chunks:
            chunk.closed = close
        if not close:
            self.chunks, self._recent = [], []
        for row in self._rows.values():
            if row.state == State.PLACED and not close:
                row.restart(self.sizes.of(row.lanes))
            elif row.state.value < State.PLACED.value:
                row.size = self.sizes.of(row.lanes)
