"""Who held what when an engine died: the rules against poison, and the lock that keeps a suspect alone.

A shard that was held at its engine's death runs again row by row, alone in its engine, each row told first; a row at
which the engine died DEATHS times alone is given up. Plain classes; cluster/dataflow.py makes the Ledger an actor.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.stages import Engine

DEATHS = 3


class State(NamedTuple):
    """How many engines load the model and how many are ready; how many shards engines hold; how often at most one engine's
    process began to load and was never ready; a number that grows with whatever happens."""

    loading: int
    ready: int
    held: int
    loads: int
    events: int


class Ledger:
    """Told which shards an engine holds and, for suspects, at which row it is. Rows are counted from 0 in a shard."""

    def __init__(self) -> None:
        self._held: set[int] = set()
        self._suspects: set[int] = set()
        self._row: dict[int, int] = {}
        self._deaths: dict[tuple[int, int], int] = {}
        self._made: set[int] = set()
        self._stopping = False
        self._loading: set[str] = set()
        self._ready: set[str] = set()
        self._loads: Counter[str] = Counter()
        self._events = 0

    def engine_loads(self, engine: str) -> None:
        """An engine's process began to load the model, perhaps again."""
        self._loads[engine] += 1
        self._loading.add(engine)
        self._ready.discard(engine)
        self.moved()

    def engine_ready(self, engine: str) -> None:
        self._loads[engine] = 0
        self._loading.discard(engine)
        self._ready.add(engine)
        self.moved()

    def moved(self) -> None:
        """Something went on: the flow does not stand still."""
        self._events += 1

    def state(self) -> State:
        """What the flow is at."""
        loads = max(self._loads.values(), default=0)
        return State(len(self._loading), len(self._ready), len(self._held), loads, self._events)

    def stop(self) -> None:
        """No shard begins any more."""
        self._stopping = True

    def under_way(self) -> tuple[set[int], set[int]]:
        """The shards that engines hold, and those that they have made, which may not be written yet."""
        return set(self._held), set(self._made)

    def ask(self, shard: int) -> tuple[bool, list[int]] | None:
        """Before a shard begins: must it run alone, and which of its rows are given up? None: it must not begin.

        A shard that is still held has lost its engine: a task runs once at a time.
        """
        if self._stopping:
            return None
        if shard in self._held:
            self._held.discard(shard)
            if shard in self._row:
                at = (shard, self._row.pop(shard))
                self._deaths[at] = self._deaths.get(at, 0) + 1
            self._suspects.add(shard)
        given_up = [row for (s, row), deaths in self._deaths.items() if s == shard and deaths >= DEATHS]
        return shard in self._suspects, sorted(given_up)

    def begun(self, shard: int) -> bool:
        """Has an engine begun it before?"""
        return shard in self._suspects or shard in self._made

    def hold(self, shard: int) -> None:
        self._held.add(shard)
        self.moved()

    def at_row(self, shard: int, row: int) -> None:
        self._row[shard] = row
        self.moved()

    def release(self, shard: int) -> None:
        self.moved()
        self._held.discard(shard)
        self._row.pop(shard, None)
        self._made.add(shard)


class LedgerClient(Protocol):
    """The Ledger as an engine's process sees it: each call returns when the ledger knows."""

    def ask(self, shard: int) -> tuple[bool, list[int]] | None: ...
    def hold(self, shard: int) -> None: ...
    def at_row(self, shard: int, row: int) -> None: ...
    def release(self, shard: int) -> None: ...


class SharedOrAlone:
    """A lock that many may share or one may have alone; who waits to be alone goes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sharing, self._waiting, self._alone = 0, 0, False

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
    """An engine whose shards are entered in the ledger. One for each process, used by its threads together."""

    def __init__(self, engine: Engine, ledger: LedgerClient, job: GenerateJob) -> None:
        self.engine, self.ledger, self.job = engine, ledger, job
        self._lock = SharedOrAlone()

    def generate_shard(self, shard: int, rows: list[list[Request]]) -> list[Result | Failure]:
        """The outcomes of a shard's requests, given by row; in order."""
        while (asked := self.ledger.ask(shard)) is None:
            time.sleep(1)  # until the run's end takes this process along
        alone, given_up = asked
        with self._lock.alone() if alone else self._lock.shared():
            self.ledger.hold(shard)
            if alone:
                outcomes = [o for number, row in enumerate(rows) for o in self._one(shard, number, row, given_up)]
            else:
                outcomes = self.engine.generate([request for row in rows for request in row])
            self.ledger.release(shard)
        return outcomes

    def _one(self, shard: int, number: int, row: list[Request], given_up: list[int]) -> list[Result | Failure]:
        if number in given_up:
            message = f"the engine's process ended {DEATHS} times at this row, alone; see the log"
            return [Failure(ErrorCode.ENGINE_CRASH, message) for _ in row]
        if row:
            self.ledger.at_row(shard, number)
        return self.engine.generate(row)
