"""Events of a run on stderr: lines of text, or with `--log-format json` one JSON object per line.

time     ISO 8601, UTC          level   info, warning or error
event    see below              job     its OUTPUT

started     rows, done, logs                    shard       shard, rows, failed, images, bytes, seconds
row_failed  shard, id, code, message            progress    rows, of, failed, images_per_second, seconds_left
stopping                                        finished    rows, ok, failed, images, seconds, exit
error       error                               submitted   id, attached
waiting     message, seconds                    rows_failed failed, first, report
warning     message                             log         message: another line of a submitted job
unknown_words   rows, words
"""

from __future__ import annotations

import json
import os
import re
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

FIRST_S = 3.0  # of waiting, until the first line
LOOK_S = 1.0  # between two looks at the reason
AGAIN_S = 30.0  # between two lines with the same reason


class SafeStream:
    """A text stream that never raises, since a message must not end a run.

    The reader may be gone, the disk full, or the encoding may lack a character. What cannot be written is
    escaped or dropped. file: None is the current sys.stderr."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    @property
    def _target(self) -> IO[str] | None:
        return self._file or sys.stderr

    def write(self, text: str) -> int:
        """Write a text. Characters that the encoding lacks are escaped."""
        # ValueError: the stream is closed; AttributeError: there is none
        with suppress(OSError, ValueError, AttributeError):
            encoding = getattr(self._target, "encoding", None) or "utf-8"
            self._target.write(text.encode(encoding, "backslashreplace").decode(encoding))  # type: ignore[union-attr]
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError, AttributeError):
            self._target.flush()  # type: ignore[union-attr]

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._target.isatty())  # type: ignore[union-attr]
        return False


def console(file: IO[str] | None = None) -> Console:
    """Return a console that never raises. file: None is the current sys.stderr."""
    return Console(file=cast(IO[str], SafeStream(file)), soft_wrap=True, highlight=False, markup=False)


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr on the null device if the process was started without them.

    Otherwise the next file to be opened would get the number of a standard stream, and printed text would be
    written to it.
    """
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
    """Writes events to a console. job: the OUTPUT that JSON events name."""

    console: Console
    format: str = LogFormat.TEXT
    job: str | None = None

    @property
    def is_terminal(self) -> bool:
        """Return whether the console is a terminal. Console.is_terminal also honours FORCE_COLOR, which
        notebooks set."""
        return self.console.file.isatty()

    def emit(self, event: str, text: str | None = None, level: str = "info", **fields: Any) -> None:
        """Write an event.

        text: the line of the text format; None writes none. fields: of the JSON format."""
        if self.format == LogFormat.JSON:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "level": level, "event": event, "job": self.job, **fields}
            self.console.file.write(json.dumps(line, default=str) + "\n")
            self.console.file.flush()
        elif text is not None:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        """Write a warning."""
        self.emit("warning", f"warning: {message}", level="warning", message=message)

    def relay(self, line: str) -> None:
        """Write a line of a submitted job's log. Its events are passed on unchanged."""
        if self.format == LogFormat.JSON and line.startswith("{"):
            self.console.file.write(line + "\n")
        else:
            self.emit("log", line, message=line)


LOG = Log(console())  # the driver sets the terminal's console here before it redirects stderr


class WaitNotice:
    """Reports from a thread what a command waits for, while it is entered.

    reason: returns the text, or None when the wait is over. A new text is reported at once, one that differs
    in its numbers alone after AGAIN_S."""

    def __init__(self, reason: Callable[[], str | None], level: str = "info") -> None:
        self._reason = reason
        self._level = level
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._report, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)  # a call of `reason` after the end of Ray could start another Ray

    def _report(self) -> None:
        began = time.monotonic()
        last_reason: str | None = None
        reported_at = began
        while not self._over.wait(FIRST_S if last_reason is None else LOOK_S):
            try:
                reason = self._reason()
            except Exception:  # the cluster is gone: the command that waits reports it
                return
            if reason is None or self._over.is_set():
                return
            now = time.monotonic()
            if _words(reason) != _words(last_reason) or now - reported_at > AGAIN_S:
                seconds = round(now - began)
                LOG.emit(
                    "waiting", f"waiting, {seconds} s: {reason}", self._level, message=reason, seconds=seconds
                )
                last_reason = reason
                reported_at = now


def _words(text: str | None) -> str | None:
    """Return a text without its numbers."""
    return text and re.sub(r"[\d.]+", "", text)
