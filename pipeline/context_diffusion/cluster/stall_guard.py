"""Ends a flow that stands still. Ray Data's own guard counts the loading of weights as a standstill; this one does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from context_diffusion.core.errors import ClusterError
from context_diffusion.generation.fault_ledger import State

LOOK_S = 2.0  # between two looks at the ledger
LOAD_S = 3600.0  # for an engine to load its model, with the download of its weights
LOADS = 3  # of one engine, each ended before it was ready


class Needs(NamedTuple):
    """The engines that a flow begins with, and what each of them reserves."""

    engines: int
    cpus: float
    gpus: float


class Standstill(ExecutionCallback):
    """Raises ClusterError from Ray Data's loop where nothing happened for `timeout_s`, or an engine loads for hours."""

    def __init__(self, look: Callable[[], State], timeout_s: float, needs: Needs) -> None:
        """look: asks the ledger; needs: for the message."""
        self._look, self._timeout_s, self._needs = look, timeout_s, needs
        self._events = -1
        self._since = self._looked = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """See whether anything happened. Called many times a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        state = self._look()
        if state.loads > LOADS:
            raise ClusterError(f"an engine's process ended {LOADS} times while it loaded the model: is there memory enough?")
        if state.events != self._events:
            self._events, self._since = state.events, now
        elif now - self._since > (LOAD_S if state.loading and not state.held else self._timeout_s):
            held = f"engines hold {state.held} shard(s), and none ends" if state.held else "no engine holds a shard"
            reason = awaited(state, self._needs) or held
            raise ClusterError(f"nothing happened for {now - self._since:.0f} s: {reason}; the same command goes on")


def ask(ledger: Any) -> State:
    """The state of the ledger's actor."""
    return State(*ray.get(ledger.state.remote()))


def awaited(state: State, needs: Needs) -> str | None:
    """What keeps engines from their work; None once all that the flow begins with are ready."""
    if state.ready >= needs.engines:
        return None
    if state.loading:
        return f"{state.loading} engine(s) load the model, {state.ready} of {needs.engines} ready"
    return f"{needs.engines - state.ready} of {needs.engines} engine(s) start or wait for room: {lacking(needs)}"


def lacking(needs: Needs) -> str:
    """What an engine reserves beside what the cluster has free."""
    free, whole = ray.available_resources(), ray.cluster_resources()
    shares = {"CPU": needs.cpus, "GPU": needs.gpus}
    return "; ".join(
        f"each takes {share:g} {name}s, {free.get(name, 0):g} of {whole.get(name, 0):g} are free"
        for name, share in shares.items()
        if share
    )
