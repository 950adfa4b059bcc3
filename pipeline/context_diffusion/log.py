"""What a run tells on stderr as it goes: lines for people, or with `--log-format json` an object a line.

time     ISO 8601, UTC          level   info, warning or error
event    see below              job     its OUTPUT

started     rows, done, logs                    shard       shard, rows, failed, images, bytes, seconds of each stage
row_failed  shard, id, code, message            progress    rows, of, failed, images_per_second, seconds_left
stopping                                        finished    rows, ok, failed, images, seconds, exit
error       error                               submitted   id, attached
waiting     message: what is waited for
warning     message                             log         message: a line of a submitted job that is no event
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from rich.console import Console


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass
class Log:
    console: Console
    format: str = LogFormat.TEXT
    job: str | None = None

    def tell(self, event: str, text: str | None = None, level: str = "info", **fields: Any) -> None:
        """text: the line for people; left out: they are not told."""
        if self.format == LogFormat.JSON:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "level": level, "event": event, "job": self.job, **fields}
            self.console.file.write(json.dumps(line) + "\n")
            self.console.file.flush()
        elif text is not None:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def relay(self, line: str) -> None:
        """A line of a submitted job's log; its events stay what they are."""
        if self.format == LogFormat.JSON and line.startswith("{"):
            self.console.file.write(line + "\n")
        else:
            self.tell("log", line, message=line)


LOG = Log(Console(stderr=True))  # the driver puts the terminal here before Ray takes stderr
