"""`run` from outside: the Ray driver runs in a child process with a session of its own; this one decides the code.

When Ray's raylet or gcs dies, Ray ends the driver with 1, or not for a minute, and `ray.init` takes over SIGTERM: so
signals, lost children and the last line of stdout are handled here, where no Ray is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from context_diffusion.core.errors import EXIT_EXTERNAL, EXIT_INTERRUPTED, EXIT_TERMINATED, ConfigError
from context_diffusion.core.event_log import LogFormat
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.uris import normal
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

GRACE_SECONDS = 3.0


class _StopSignalError(Exception):
    def __init__(self, number: int) -> None:
        self.exit = EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED


def supervise(
    job: GenerateJob, options: dict[str, Any], grace_s: float = 20.0, log_format: str = LogFormat.TEXT
) -> dict[str, Any]:
    """Runs the driver; -> its summary, or what is known of OUTPUT where it could not give one. `exit` always in it.
    grace_s: after SIGTERM, for the shards that were begun."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _supervise(handed_over(job, options, log_format), job, grace_s)
    finally:
        for number, handler in before.items():  # the file's next job may not know ours
            signal.signal(number, handler)


def _supervise(given: bytes, job: GenerateJob, grace_s: float) -> dict[str, Any]:
    started = time.monotonic()
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "context_diffusion.cluster.driver_process", str(writing)],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,  # whatever Ray prints; stdout is for the result
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(writing)
    try:
        assert child.stdin
        child.stdin.write(given)
        child.stdin.flush()
        text = _line(reading)
        child.wait()
    except _StopSignalError as stopped:
        text = _last_word(child, reading, grace_s if stopped.exit == EXIT_TERMINATED else 0)
        if '"rows"' not in text:  # it had not just finished
            return _known(job, stopped.exit, "stopped; the same command goes on", started)
    finally:
        os.close(reading)
        child.kill()  # where it still lives its time is over, and it does not heed SIGTERM
        end_session(child.pid)
        child.wait()
    if text.strip():
        summary = json.loads(text)
        if "rows" in summary:
            return summary
        return _known(job, summary["exit"], summary["error"], started)
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"code {child.returncode}"
    return _known(job, EXIT_EXTERNAL, f"the Ray driver ended with {how} and no result; the same command goes on", started)


def handed_over(job: GenerateJob, options: dict[str, Any], log_format: str = LogFormat.TEXT) -> bytes:
    """The child's line. Keys that are not set stay so: what is left out of a model's parts is its preset's."""
    given = {"job": job.model_dump(mode="json", exclude_unset=True), "options": options, "log_format": log_format}
    return json.dumps(given).encode() + b"\n"


def _stop(number: int, _frame: Any) -> None:
    raise _StopSignalError(number)


def _line(reading: int, seconds: float | None = None) -> str:
    """What the driver says at its end; nothing where it ends without, or not in that time."""
    until, text = None if seconds is None else time.monotonic() + seconds, b""
    while not text.endswith(b"\n"):
        left = None if until is None else max(until - time.monotonic(), 0.0)
        if not select.select([reading], [], [], left)[0] or not (more := os.read(reading, 65536)):
            break
        text += more
    return text.decode()


def _last_word(child: subprocess.Popen[bytes], reading: int, grace_s: float) -> str:
    """Tells the driver to begin no more shards, and waits. A second signal ends the patience."""
    if grace_s <= 0 or child.poll() is not None:
        return ""
    try:
        assert child.stdin
        child.stdin.write(b"stop\n")
        child.stdin.flush()
        return _line(reading, grace_s)
    except (_StopSignalError, BrokenPipeError):
        return ""


def end_session(session: int, spared: int | None = None) -> None:
    """Ends every process of a session but `spared`: the driver and the Ray that it started. First politely."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        until = time.monotonic() + patience
        while (members := [pid for pid in _members(session) if pid != spared]) and time.monotonic() < until:
            for pid in members:
                _kill(pid, number)
            time.sleep(0.1)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _members(session: int) -> list[int]:
    """The living processes of a session, from /proc: state and session are the third and sixth field of stat."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def _known(job: GenerateJob, code: int, error: str, started: float) -> dict[str, Any]:
    """What OUTPUT's parts say, where the run itself could not."""
    output = Output(normal(job.output), Storage(job.storage_options, deadline_s=5))
    summary: dict[str, Any] = {"output": output.root, "rows": 0, "ok": 0, "failed": 0, "images": 0}
    try:
        counts = output.count()
        summary |= {"rows": counts.rows, "ok": counts.ok, "failed": counts.failed, "images": counts.images}
    except ConfigError:  # what `error` says already
        pass
    except Exception as uncounted:
        error += f" (OUTPUT could not be counted: {uncounted})"
    seconds = round(time.monotonic() - started, 2)
    return {**summary, "skipped": 0, "seconds": seconds, "images_per_second": 0.0, "exit": code, "error": error}
