"""Rows are prepared for their chunk: conditions encoded, the table of coefficients made, noise drawn. On a
CPU this runs beside the steps.

S steps
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Failure, Request
from context_diffusion.core.settings import Settings
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.chunk import Chunk
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.rows import (
    Prepared,
    Row,
    State,
    failure_of,
    free_memory,
    is_out_of_memory,
)
from context_diffusion.engine.scheduler_tables import Table, make_table
from context_diffusion.engine.scheduling import fitting

NOISE_COLUMN = 6  # of scheduler_tables.Table
LAST = 4  # chunks that the rows left of a group would fill


class Preparation:
    """Prepares rows for chunks in a pool of threads.

    ahead: rows are prepared beside the steps, not when a chunk needs them."""

    def __init__(self, backbone: Backbone, cache: Cache, pool: Executor, ahead: bool) -> None:
        self.backbone, self.cache, self.pool, self.ahead = backbone, cache, pool, ahead
        self.futures: dict[Row, Future[Prepared]] = {}
        self._held: int | None = None  # rows placed when memory did not suffice for another one
        self._failed: list[tuple[Row, Failure]] = []

    def fill(self, chunk: Chunk, rows: list[Row], placed: int, in_order: bool) -> bool:
        """Place prepared rows in a chunk, and begin to prepare others for it. Returns whether it has all its
        rows: with one still being prepared it would advance with an empty lane.

        rows: without a place, that could go to it, the oldest first. placed: rows in chunks. in_order: an
        overdue row is not passed over by later ones that fit."""
        if not in_order:
            # Of the last rows of a group the longest go first, so that they end together.
            last = sum(row.lanes for row in rows) <= LAST * chunk.size
            rows = sorted(rows, key=lambda row: -row.request.settings.num_inference_steps if last else 0)
            rows.sort(key=lambda row: -row.state.value)  # those that are prepared go first
        chosen = [rows[number] for number in fitting([row.lanes for row in rows], chunk.free, in_order)]
        self._begin([row for row in chosen if row.state == State.WAITING], placed)
        for row in chosen:
            if row.state == State.PREPARED:
                chunk.place(row)
        if self.ahead:
            room = chunk.size - sum(
                row.lanes for row in rows if row.state in (State.PREPARING, State.PREPARED)
            )
            waiting = [row for row in rows if row.state == State.WAITING]
            self._begin([waiting[n] for n in fitting([row.lanes for row in waiting], room)], placed)
        return not any(row.state == State.PREPARING for row in chosen)

    def _begin(self, rows: list[Row], placed: int) -> None:
        if self._held is not None and placed >= self._held:
            return
        self._held = None
        for row in rows:
            row.state = State.PREPARING
            self.futures[row] = self.pool.submit(prepare, row, self.backbone, self.cache)
        if not self.ahead:
            self.collect(placed)

    def collect(self, placed: int) -> None:
        """Mark the rows that are prepared. A row that did not fit into memory beside `placed` rows waits
        until there are fewer. Raises torch.AcceleratorError for a lost device."""
        for row in [row for row, future in self.futures.items() if future.done()]:
            future = self.futures.pop(row)
            error = future.exception()
            if error is None:
                row.prepared, row.state = future.result(), State.PREPARED
            elif isinstance(error, torch.AcceleratorError):
                raise error
            elif is_out_of_memory(error) and placed:
                self._held = placed
                row.restart(row.size)
                free_memory()
            else:
                self._failed.append((row, failure_of(error)))

    def take_failed(self) -> list[tuple[Row, Failure]]:
        """Return the rows that failed since the last call, each for its own reason."""
        failed, self._failed = self._failed, []
        return failed


@torch.inference_mode()
def prepare(row: Row, backbone: Backbone, cache: Cache) -> Prepared:
    """Encode a row and draw its noise. Raises RowError where the row cannot be generated."""
    started, request, settings = time.perf_counter(), row.request, row.request.settings
    assert settings.seed is not None, "the seed is derived before the engine"
    first = start_step(settings.num_inference_steps, settings.strength)
    table = make_table(
        settings.scheduler,
        settings.num_inference_steps,
        backbone.scheduler_config,
        first,
        backbone.schedule(request),
    )
    encoded = backbone.encode(request, row.branches, cache)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    latents = _first_latents(request, table, backbone, generator)
    acting = torch.zeros(len(table), backbone.num_controlnets)
    if encoded.control is not None:
        acting = control_factors(len(table), settings, backbone.num_controlnets)
    window = acting.any(1).tolist()
    columns = torch.cat([table.timesteps[:, None], table.coefficients.float(), acting], 1)
    noise = _noise(table, latents.shape[1:], generator)
    row.seconds += time.perf_counter() - started
    return Prepared(encoded, latents, columns, noise, window)


def _first_latents(request: Request, table: Table, backbone: Backbone, generator: torch.Generator) -> Tensor:
    """Return noise at the scheduler's scale, or the query's latents with the noise of the first step."""
    shape = (1, *backbone.latent_shape(request))
    if request.settings.strength is None:
        return torch.randn(shape, generator=generator) * (table.init_scale * backbone.noise_scale)
    latents = backbone.encode_query(request, generator)  # draws before the noise, as diffusers does
    image, scale = table.noised  # 1 and 0 where the strength is too small for a step
    return latents * image + torch.randn(shape, generator=generator).to(latents.device) * scale


def _noise(table: Table, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """Draw the noise of all steps; a step that adds none draws none."""
    added = table.coefficients[:, NOISE_COLUMN] != 0
    if not added.any():
        return None
    noise = torch.zeros(len(table), *shape)
    for step in added.nonzero()[:, 0].tolist():
        noise[step] = torch.randn(1, *shape, generator=generator)[0]
    return noise


def start_step(steps: int, strength: float | None) -> int:
    """Return the first step of an image-to-image row, as diffusers counts it: steps - min(int(steps ·
    strength), steps)."""
    return 0 if strength is None else max(steps - min(int(steps * strength), steps), 0)


def control_factors(steps: int, settings: Settings, networks: int) -> Tensor:
    """Return 1 where a ControlNet acts, else 0, for each step and ControlNet (S, N). Raises RowError where
    the row's windows are not as many as the ControlNets."""
    try:
        windows = settings.control_windows(networks)
    except ValueError as error:
        raise RowError(ErrorCode.INVALID_SETTING, str(error)) from None
    factors = torch.zeros(steps, networks)
    for network, (start, end) in enumerate(windows):
        factors[control_window(steps, start, end), network] = 1.0
    return factors


def control_window(steps: int, start: float, end: float) -> range:
    """Return the steps at which the ControlNet acts: diffusers keeps step i where i/n >= start and (i+1)/n <=
    end."""
    inside = [i for i in range(steps) if not (i / steps < start or (i + 1) / steps > end)]
    return range(inside[0], inside[-1] + 1) if inside else range(0)
