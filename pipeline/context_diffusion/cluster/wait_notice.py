"""Says what is waited for, so that a command that waits does not look like one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from context_diffusion.core.event_log import LOG

FIRST_S, AGAIN_S = 3.0, 30.0  # of waiting, until the first line and between two lines about the same


class Waiting:
    """Tells what is waited for, from a thread, while it is entered.

    reason: gives the text, or None where nothing is waited for any more. A text that changes is told at once.
    """

    def __init__(self, reason: Callable[[], str | None]) -> None:
        self._reason, self._over = reason, threading.Event()
        self._thread = threading.Thread(target=self._tell, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(timeout=5)  # a late question could find Ray gone, and start another

    def _tell(self) -> None:
        began, told, told_at = time.monotonic(), None, 0.0
        while not self._over.wait(FIRST_S if told is None else 1.0):
            try:
                if (reason := self._reason()) is None or self._over.is_set():
                    return
            except Exception:  # its cluster is gone: the one that waits is told by itself
                return
            now = time.monotonic()
            if reason != told or now - told_at > AGAIN_S:
                seconds = round(now - began)
                LOG.tell("waiting", f"waiting, {seconds} s: {reason}", message=reason, seconds=seconds)
                told, told_at = reason, now
