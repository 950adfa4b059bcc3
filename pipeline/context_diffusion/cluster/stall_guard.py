"""Ends a flow that makes no progress. Unlike Ray Data's own guard, this one does not count the loading of
weights as a stall."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from context_diffusion.core.errors import ClusterError
from context_diffusion.generation.fault_ledger import State

CHECK_S = 2.0  # between two checks of the ledger
LOAD_S = 3600.0  # the limit for an engine to load its model, with the download of its weights
LOADS = 3  # the limit of one engine's loads that ended before it was ready


class EngineNeeds(NamedTuple):
    """The number of engines with which a flow starts, and the CPUs and GPUs that each reserves."""

    engines: int
    cpus: float
    gpus: float


class StallGuard(ExecutionCallback):
    """Raises ClusterError from Ray Data's loop if nothing happens for `timeout_s`, or an engine cannot load
    its model.

    get_state: asks the ledger; needs: for the message."""

    def __init__(self, get_state: Callable[[], State], timeout_s: float, needs: EngineNeeds) -> None:
        self._get_state = get_state
        self._timeout_s = timeout_s
        self._needs = needs
        self._events = -1
        self._last_event = time.monotonic()
        self._last_check = self._last_event

    def on_execution_step(self, executor: Any) -> None:
        """Check whether anything happened. Called many times a second."""
        now = time.monotonic()
        if now - self._last_check < CHECK_S:
            return
        self._last_check = now
        state = self._get_state()
        if state.loads > LOADS:
            message = f"an engine's process ended {LOADS} times while it loaded the model"
            raise ClusterError(f"{message}: check that the node has enough memory")
        if state.events != self._events:
            self._events = state.events
            self._last_event = now
            return
        limit = LOAD_S if state.loading and not state.held else self._timeout_s
        if now - self._last_event > limit:
            held = (
                f"engines hold {state.held} shard(s) and finish none"
                if state.held
                else "no engine has a shard"
            )
            reason = missing_engines(state, self._needs) or held
            seconds = f"{now - self._last_event:.0f} s"
            raise ClusterError(f"no progress for {seconds}: {reason}; rerun the same command to resume")


def state_of(ledger: Any) -> State:
    """Return the state of the ledger's actor."""
    return State(*ray.get(ledger.state.remote()))


def missing_engines(state: State, needs: EngineNeeds) -> str | None:
    """Return why engines are not ready; None if all with which the flow starts are."""
    if state.ready >= needs.engines:
        return None
    if state.loading:
        return f"{state.loading} engine(s) load the model, {state.ready} of {needs.engines} ready"
    missing = f"{needs.engines - state.ready} of {needs.engines} engine(s) start or wait for resources"
    return f"{missing}: {_missing_resources(needs)}"


def _missing_resources(needs: EngineNeeds) -> str:
    """Return what an engine reserves and what is free in the cluster."""
    free = ray.available_resources()
    total = ray.cluster_resources()
    shares = {"CPU": needs.cpus, "GPU": needs.gpus}
    return "; ".join(
        f"each needs {share:g} {name}, {free.get(name, 0):g} of {total.get(name, 0):g} are free"
        for name, share in shares.items()
        if share
    )
