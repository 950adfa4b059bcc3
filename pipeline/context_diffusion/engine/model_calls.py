"""The calls of the model for one step of some rows of one shape: in chunks, padded, never shrunk. On a CPU
several calls run at once, each on one thread: that is quicker than several threads a call, and the bits don't
depend on their number.

R rows, each of 1 to 3 lanes   P lanes a chunk   C h w latents
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone, Conditions
from context_diffusion.engine.slots import Slot

Residuals = dict[tuple[int, str], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Fixed by model and kind of device, for it decides the bits. chunk: lanes in one call of the model;
    control: rows in one call of the ControlNet; lanes: of all rows that go on in a step, at most."""

    chunk: int
    lanes: int
    control: int = 1


@dataclass
class Calls:
    """Runs the backbone's calls on its device. threads: calls that run at once, on a CPU."""

    backbone: Backbone
    device: torch.device
    shape: Shape
    threads: int = 1

    def __post_init__(self) -> None:
        many = self.threads > 1 and self.device.type == "cpu"
        # Each thread sets its own number of torch's threads: another engine of this process may just have
        # changed it.
        self._pool = ThreadPoolExecutor(self.threads, "calls", torch.set_num_threads, (1,)) if many else None

    def _each(self, call: Callable[[list[Any]], Any], items: list[Any], size: int) -> Iterator[Any]:
        """The results of calls for chunks of the items, in order."""
        run = self._pool.map if self._pool else map
        return iter(
            run(
                torch.inference_mode()(call),
                [items[start : start + size] for start in range(0, len(items), size)],
            )
        )

    def guided(self, slots: list[Slot]) -> tuple[Tensor, int]:
        """-> the guided outputs (R, C, h, w), and the lanes that the calls had room for."""
        residuals = self._control(slots)
        work = [(row, lane) for row, slot in enumerate(slots) for lane in range(slot.lanes)]
        guided: list[Any] = [0] * len(slots)
        outputs = self._each(lambda part: self._predict(slots, part, residuals), work, self.shape.chunk)
        for (row, lane), output in zip(work, chain.from_iterable(outputs), strict=True):
            guided[row] = guided[row] + slots[row].weights[lane] * output
        return torch.cat(guided), -(-len(work) // self.shape.chunk) * self.shape.chunk

    def _inputs(self, slots: list[Slot]) -> tuple[Tensor, Tensor]:
        """Latents as the model takes them, and their timesteps."""
        times = torch.stack([slot.timestep for slot in slots]).to(self.device)
        return torch.cat([slot.model_input for slot in slots]), times

    def _control(self, slots: list[Slot]) -> Residuals:
        """The ControlNet's residuals of each row that is in its window, by row and control key: once for all
        the lanes that have the key."""
        wanted: dict[tuple[int, str], tuple[int, int]] = {}
        for row, slot in enumerate(slots):
            if slot.controlled:
                for lane, key in enumerate(slot.encoded.control_keys):
                    wanted.setdefault((row, key), (row, lane))

        def control(part: list[tuple[int, int]]) -> Iterator[list[Tensor]]:
            places = _padded(part, self.shape.control)
            latents, times = self._inputs([slots[row] for row, _ in places])
            lanes = stack([slots[row].encoded.control_lanes[lane] for row, lane in places])
            maps = stack([slots[row].encoded.control or {} for row, _ in places])
            residuals = self.backbone.control(latents, times, lanes, maps)
            return ([residual[number : number + 1] for residual in residuals] for number in range(len(part)))

        made = chain.from_iterable(self._each(control, list(wanted.values()), self.shape.control))
        return dict(zip(wanted, made, strict=True))

    def _predict(self, slots: list[Slot], part: list[tuple[int, int]], residuals: Residuals) -> Any:
        """One call of the model for up to P lanes, padded to P with copies of the first. -> their outputs (1,
        C, h, w)."""
        places = _padded(part, self.shape.chunk)
        latents, times = self._inputs([slots[row] for row, _ in places])
        lanes = stack([slots[row].encoded.lanes[lane] for row, lane in places])
        given = _filled([residuals.get((row, slots[row].encoded.control_keys[lane])) for row, lane in places])
        return self.backbone.predict(latents, times, lanes, given).float().split(1)[: len(part)]


def stack(conditions: list[Conditions]) -> Conditions:
    """Return the conditions of several lanes or rows, (1, ...) each, as (B, ...) by the same names."""
    return {name: torch.cat([lane[name] for lane in conditions]) for name in conditions[0]}


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Within it a row's bits don't depend on its place in a call. On a CPU: one thread of torch's, whose
    number changes them. On a GPU: no TF32, whose kernels add up in another order at another place (3 of 24
    rows, seen on an H200)."""
    if device.type == "cuda":
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _padded(part: list[Any], size: int) -> list[Any]:
    """With copies of the first, which cost what they cost and change nothing."""
    return [*part, *[part[0]] * (size - len(part))]


def _filled(given: list[list[Tensor] | None]) -> list[Tensor] | None:
    """Residuals in a batch, zeros for rows without; None where none has any."""
    known = next((one for one in given if one is not None), None)
    if known is None:
        return None
    none = [torch.zeros_like(residual) for residual in known]
    return [torch.cat(parts) for parts in zip(*(none if one is None else one for one in given), strict=True)]
