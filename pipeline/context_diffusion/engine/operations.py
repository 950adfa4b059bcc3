"""Work done and work spared: floating-point operations of a job's rows, against what diffusers must run for them.

Counted by torch's FLOP counter, once for each kind of call and its shapes, in a call of its own whose result is dropped:
under the counter torch takes calls apart, and the bits of a row must not depend on who was first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.flop_counter import FlopCounterMode

Value = TypeVar("Value")
BRANCHES = 2  # of every row in a batch of diffusers where any row is guided


class Operations:
    """done: what was run. wanted: what rows asked of the encoders, as if nothing were cached. Both FLOPs."""

    def __init__(self) -> None:
        self.done, self.wanted = 0.0, 0.0
        self._costs: dict[tuple[Any, ...], float] = {}
        self._lock = threading.Lock()  # calls may run at once

    def call(self, key: tuple[Any, ...], function: Callable[[], Value]) -> Value:
        """Runs it and adds its cost. key: calls with equal keys cost the same."""
        with self._lock:
            self.done += self.cost(key, function)
        return function()

    def cost(self, key: tuple[Any, ...], function: Callable[[], Any]) -> float:
        """Of one call, counted at the first."""
        if key not in self._costs:
            with FlopCounterMode(display=False) as counter:
                function()
            self._costs[key] = float(counter.get_total_flops())
        return self._costs[key]

    def known(self, key: tuple[Any, ...]) -> float:
        """Of one call, if there was one."""
        return self._costs.get(key, 0.0)


class NotCounted(Operations):
    """Where nobody asks."""

    def call(self, key: tuple[Any, ...], function: Callable[[], Value]) -> Value:
        return function()

    def cost(self, key: tuple[Any, ...], function: Callable[[], Any]) -> float:
        return 0.0
