"""What a run tells on stderr as it goes: lines for people, or with `--log-format json` an object a line.

time     ISO 8601, UTC          level   info, warning or error
event    see below              job     its OUTPUT

started     rows, done, logs                    shard       shard, rows, failed, images, bytes, seconds of each stage
row_failed  shard, id, code, message            progress    rows, of, failed, images_per_second, seconds_left
stopping                                        finished    rows, ok, failed, images, seconds, exit
error       error                               submitted   id, attached
waiting     message, seconds                    rows_failed failed, first, report
warning     message                             log         message: a line of a submitted job that is no event
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any, Self, cast

from rich.console import Console

FIRST_S, AGAIN_S = 3.0, 30.0  # of waiting, until the first line and between two lines about the same


class Harmless:
    """A text stream that never raises: nobody may read it any more, its disk may be full, its encoding may
    lack a sign. What it cannot say is left out or escaped, since a message must not end a run. file: None is
    stderr as it is then."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    @property
    def _target(self) -> IO[str] | None:
        return self._file or sys.stderr

    def write(self, text: str) -> int:
        # ValueError: it is closed; AttributeError: there is none
        with suppress(OSError, ValueError, AttributeError):
            encoding = getattr(self._target, "encoding", None) or "utf-8"
            self._target.write(text.encode(encoding, "backslashreplace").decode(encoding))  # type: ignore[union-attr]
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._target.flush()  # type: ignore[union-attr]

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._target.isatty())  # type: ignore[union-attr]
        return False


def console(file: IO[str] | None = None) -> Console:
    """Where people and programs are told. file: None is stderr."""
    return Console(file=cast(IO[str], Harmless(file)), soft_wrap=True, highlight=False, markup=False)


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr an empty one: the next file that is
    opened would get its number, and be written to by all that prints."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass
class Log:
    console: Console
    format: str = LogFormat.TEXT
    job: str | None = None

    @property
    def is_terminal(self) -> bool:
        """Does a person look at it as it goes? Console.is_terminal also believes FORCE_COLOR, which notebooks
        set."""
        return self.console.file.isatty()

    def tell(self, event: str, text: str | None = None, level: str = "info", **fields: Any) -> None:
        """text: the line for people; left out: they are not told."""
        if self.format == LogFormat.JSON:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "level": level, "event": event, "job": self.job, **fields}
            self.console.file.write(json.dumps(line, default=str) + "\n")
            self.console.file.flush()
        elif text is not None:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def relay(self, line: str) -> None:
        """A line of a submitted job's log; its events stay what they are."""
        if self.format == LogFormat.JSON and line.startswith("{"):
            self.console.file.write(line + "\n")
        else:
            self.tell("log", line, message=line)


LOG = Log(console())  # the driver puts the terminal here before Ray takes stderr


class Waiting:
    """Tells what is waited for, from a thread, while it is entered: a command that waits is not to look like one that hangs.

    reason: gives the text, or None where nothing is waited for any more. A text that changes is told at once.
    """

    def __init__(self, reason: Callable[[], str | None], level: str = "info") -> None:
        self._reason, self._level, self._over = reason, level, threading.Event()
        self._thread = threading.Thread(target=self._tell, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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
                LOG.tell("waiting", f"waiting, {seconds} s: {reason}", self._level, message=reason, seconds=seconds)
                told, told_at = reason, now
