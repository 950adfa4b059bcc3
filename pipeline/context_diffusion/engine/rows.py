"""A row under way, and why one has no image.

S steps
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Failure, Pixels, Request
from context_diffusion.engine.backbone import Encoded
from context_diffusion.engine.guidance import Branch

TOO_LARGE = Failure(
    ErrorCode.OUT_OF_MEMORY,
    "the row alone does not fit into the device's memory: try a smaller width and height",
)


class State(Enum):
    """How far a row is."""

    WAITING, PREPARING, PREPARED, PLACED, FINISHING = range(5)


@dataclass(eq=False)
class Row:
    """A request that the engine has taken.

    order: of arrival. group: its shape group. size: lanes of the chunk that it goes to.
    """

    request: Request
    order: int
    group: Hashable
    branches: list[Branch]
    size: int
    state: State = State.WAITING
    prepared: Prepared | None = None
    step: int = 0
    seconds: float = 0.0
    used: int = 0  # lane steps, and its share of those that the calls had room for
    paid: float = 0.0

    @property
    def lanes(self) -> int:
        return len(self.branches)

    @property
    def ready(self) -> Prepared:
        assert self.prepared is not None, "rows are prepared before they are placed"
        return self.prepared

    @property
    def steps(self) -> int:
        return len(self.ready.window)

    @property
    def guidance_rescale(self) -> float:
        """How far the guided output is rescaled; 0 without guidance."""
        return self.request.settings.guidance_rescale if self.lanes > 1 else 0.0

    def restart(self, size: int) -> None:
        """Wait again, for a chunk of `size` lanes, to begin with the first step."""
        self.state, self.prepared, self.step, self.size = State.WAITING, None, 0, size


@dataclass(frozen=True)
class Prepared:
    """What a row's steps read.

    latents: (1, ...) float32, the first ones. table: (S, 8 + N) float32: timestep, the seven columns of
    scheduler_tables.Table, and for each of N ControlNets 1 where it acts, else 0. noise: (S, ...) float32,
    drawn in the order in which diffusers draws; None: the scheduler adds none. window: whether any ControlNet
    acts, at each step.
    """

    encoded: Encoded
    latents: Tensor
    table: Tensor
    noise: Tensor | None
    window: list[bool] = field(repr=False)


@dataclass(frozen=True)
class StepUpdate:
    """What a callback receives after a step of a row; preview() decodes what the model holds to be the image
    now."""

    request: Request
    step: int
    steps: int
    preview: Callable[[], Pixels]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory, the device's or the machine's, was not enough."""
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free_memory() -> None:
    """Return unused memory of a GPU to the driver, after it has run out."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def failure_of(error: BaseException) -> Failure:
    """Return a row's failure, from whatever its admission raised."""
    if isinstance(error, RowError):
        return Failure(error.code, error.message)
    if is_out_of_memory(error):
        return TOO_LARGE
    return Failure(ErrorCode.ENGINE_ERROR, " ".join(f"{type(error).__name__}: {error}".split())[:500])
