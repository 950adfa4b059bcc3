"""One engine thread for many callers: each submits its rows and gets their results in the same order."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from context_diffusion.core.records import EngineStats, Failure, Request, Result
from context_diffusion.engine.engine import Engine

Done = Future[Result | Failure]


class EngineService:
    """Runs an Engine in a thread of its own. `generate` may be called from several threads at once.

    broken: called with the exception when the engine itself fails (device lost); callers get it too, at once
    and later."""

    def __init__(self, engine: Engine, broken: Callable[[BaseException], None] | None = None) -> None:
        self.engine, self.broken = engine, broken
        self._inbox: queue.SimpleQueue[tuple[Request, Done]] = queue.SimpleQueue()
        # Keyed by the request object: two callers may submit equal requests.
        self._futures: dict[int, Done] = {}
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # of the inbox and the error: nothing enters once the engine is broken
        threading.Thread(target=self._loop, name="engine", daemon=True).start()

    def generate(self, requests: list[Request]) -> list[Result | Failure]:
        """Generate requests; return their results in the same order when all are finished. Raises the error
        that broke the engine."""
        futures: list[Done] = [Future() for _ in requests]
        with self._lock:
            if self._error:
                raise self._error
            for request, future in zip(requests, futures, strict=True):
                self._inbox.put((request, future))
        return [future.result() for future in futures]

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def _loop(self) -> None:
        try:
            while True:
                self._take()
                for request, outcome in self.engine.step():
                    self._futures.pop(id(request)).set_result(outcome)
        except BaseException as error:
            logging.getLogger(__name__).error("the engine failed", exc_info=error)
            self._fail(error)
            if self.broken:
                self.broken(error)

    def _take(self) -> None:
        """Pass submitted requests to the engine; wait if there are none."""
        while self.engine.idle or not self._inbox.empty():
            request, future = self._inbox.get()
            self._futures[id(request)] = future
            self.engine.add(request)

    def _fail(self, error: BaseException) -> None:
        """Give the error to all callers: the engine's state is unknown now, and nobody may wait for it or use
        it again."""
        with self._lock:
            self._error = error
            while not self._inbox.empty():
                _, future = self._inbox.get()
                future.set_exception(error)
        for future in self._futures.values():
            future.set_exception(error)
