"""Ends a flow that stands still. Ray Data's own guard counts the loading of weights as a standstill; this one does not."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from context_diffusion.errors import ClusterError

LOOK_S = 2.0  # between two looks at the ledger
LOAD_S = 3600.0  # for an engine to load its model, with the download of its weights


class Needs(NamedTuple):
    """The engines that a flow begins with, and what each of them reserves."""

    engines: int
    cpus: float
    gpus: float


class Standstill(ExecutionCallback):
    """Raises ClusterError from Ray Data's loop where no shard began or ended for `timeout_s`, or an engine loads for hours."""

    def __init__(self, ledger: Any, timeout_s: float, needs: Needs) -> None:
        """ledger: the actor; needs: for the message."""
        self._ledger, self._timeout_s, self._needs = ledger, timeout_s, needs
        self._state: Any = None
        self._since = self._looked = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """See whether anything moved. Called many times a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        state = loading, ready, *_ = ray.get(self._ledger.state.remote())
        if state != self._state:
            self._state, self._since = state, now
        elif now - self._since > (LOAD_S if loading and not ready else self._timeout_s):
            reason = awaited(loading, ready, self._needs) or "shards were begun, and none ended"
            raise ClusterError(f"nothing moved for {now - self._since:.0f} s: {reason}; the same command goes on")


def awaited_of(ledger: Any, needs: Needs) -> str | None:
    """What a flow waits for at its beginning, asked of the ledger's actor."""
    loading, ready, *_ = ray.get(ledger.state.remote())
    return awaited(loading, ready, needs)


def awaited(loading: int, ready: int, needs: Needs) -> str | None:
    """What keeps engines from their work; None once all that the flow begins with are ready."""
    if ready >= needs.engines:
        return None
    if loading:
        return f"{loading} engine(s) load the model, {ready} of {needs.engines} ready"
    return f"{needs.engines - ready} of {needs.engines} engine(s) start or wait for room: {lacking(needs)}"


def lacking(needs: Needs) -> str:
    """What an engine reserves beside what the cluster has free."""
    free, whole = ray.available_resources(), ray.cluster_resources()
    shares = {"CPU": needs.cpus, "GPU": needs.gpus}
    return "; ".join(
        f"each takes {share:g} {name}s, {free.get(name, 0):g} of {whole.get(name, 0):g} are free"
        for name, share in shares.items()
        if share
    )
