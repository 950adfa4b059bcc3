"""Records which shards an engine held when it died, so that a row that kills engines cannot end the job.

A shard whose engine died runs again row by row, alone in its engine, and each row is recorded before it
starts. A row at which the engine died DEATHS times is given up. These are plain classes; cluster/dataflow.py
makes the Ledger an actor."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.stages.generate import Engine

DEATHS = 3


class State(NamedTuple):
    """The state of a run.

    loading, ready: numbers of engines; held: shards that engines hold; loads: the most times that one
    engine's process started to load the model without becoming ready; events: a number that grows with every
    event."""

    loading: int
    ready: int
    held: int
    loads: int
    events: int


class Ledger:
    """Knows which shards engines hold and, for suspects, at which row they are. Rows are counted from 0 in a
    shard."""

    def __init__(self) -> None:
        self._held: set[int] = set()
        self._suspects: set[int] = set()
        self._row: dict[int, int] = {}
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._finished: set[int] = set()
        self._stopping = False
        self._loading: set[str] = set()
        self._ready: set[str] = set()
        self._loads: Counter[str] = Counter()
        self._events = 0

    def engine_loads(self, engine: str) -> None:
        """Record that an engine's process started to load the model, perhaps again."""
        self._loads[engine] += 1
        self._loading.add(engine)
        self._ready.discard(engine)
        self.record_event()

    def engine_ready(self, engine: str) -> None:
        """Record that an engine has loaded its model."""
        self._loads[engine] = 0
        self._loading.discard(engine)
        self._ready.add(engine)
        self.record_event()

    def record_event(self) -> None:
        """Record an event: the run makes progress."""
        self._events += 1

    def state(self) -> State:
        """Return the state of the run."""
        loads = max(self._loads.values(), default=0)
        return State(len(self._loading), len(self._ready), len(self._held), loads, self._events)

    def stop(self) -> None:
        """Let no further shard start."""
        self._stopping = True

    def in_progress(self) -> tuple[set[int], set[int]]:
        """Return the shards that engines hold, and those that they have finished, which may not be written
        yet."""
        return set(self._held), set(self._finished)

    def ask(self, shard: int) -> tuple[bool, list[int]] | None:
        """Return, before a shard starts, whether it must run alone and which of its rows are given up; None:
        it must not start.

        A shard that is still held has lost its engine, since a task runs once at a time.
        """
        if self._stopping:
            return None
        if shard in self._held:
            self._held.discard(shard)
            if shard in self._row:
                self._deaths[shard, self._row.pop(shard)] += 1
            self._suspects.add(shard)
        given_up = [
            row for (suspect, row), deaths in self._deaths.items() if suspect == shard and deaths >= DEATHS
        ]
        return shard in self._suspects, sorted(given_up)

    def begun(self, shard: int) -> bool:
        """Return whether an engine has started the shard before."""
        return shard in self._suspects or shard in self._finished

    def hold(self, shard: int) -> None:
        """Record that an engine holds the shard."""
        self._held.add(shard)
        self.record_event()

    def at_row(self, shard: int, row: int) -> None:
        """Record the row that a suspect shard starts."""
        self._row[shard] = row
        self.record_event()

    def release(self, shard: int) -> None:
        """Record that an engine has finished the shard."""
        self.record_event()
        self._held.discard(shard)
        self._row.pop(shard, None)
        self._finished.add(shard)


class LedgerClient(Protocol):
    """The Ledger as an engine's process sees it: each call returns when the ledger has recorded it."""

    def ask(self, shard: int) -> tuple[bool, list[int]] | None: ...
    def hold(self, shard: int) -> None: ...
    def at_row(self, shard: int, row: int) -> None: ...
    def release(self, shard: int) -> None: ...


class SharedOrAlone:
    """A lock that many may share or one may hold alone. Exclusive waiters have priority."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._alone and not self._sharing)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()


class GuardedEngine:
    """An engine whose shards are recorded in the ledger. One per process, shared by its threads."""

    def __init__(self, engine: Engine, ledger: LedgerClient) -> None:
        self.engine, self.ledger = engine, ledger
        self._lock = SharedOrAlone()

    def generate_shard(self, shard: int, rows: list[list[Request]]) -> list[Result | Failure]:
        """Return the outcomes of a shard's requests, given by row, in their order."""
        while (answer := self.ledger.ask(shard)) is None:
            time.sleep(1)  # until the end of the run ends this process
        alone, given_up = answer
        with self._lock.alone() if alone else self._lock.shared():
            self.ledger.hold(shard)
            if alone:
                outcomes = [
                    outcome
                    for number, row in enumerate(rows)
                    for outcome in self._row_alone(shard, number, row, given_up)
                ]
            else:
                outcomes = self.engine.generate([request for row in rows for request in row])
            self.ledger.release(shard)
        return outcomes

    def _row_alone(
        self, shard: int, number: int, row: list[Request], given_up: list[int]
    ) -> list[Result | Failure]:
        if number in given_up:
            message = f"the engine's process ended {DEATHS} times while it ran this row alone; see the log"
            return [Failure(ErrorCode.ENGINE_CRASH, message) for _ in row]
        if row:
            self.ledger.at_row(shard, number)
        return self.engine.generate(row)
