"""Runs the Ray driver in a child process with its own session, and decides the exit code.

If Ray's raylet or gcs dies, Ray ends the driver with 1, or only after a minute, and `ray.init` replaces the
handler of SIGTERM. So signals, lost children and the last line of stdout are handled here, without Ray.
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

END_S = 3.0  # the limit for processes to end after SIGTERM, and after SIGKILL
RESUME = "rerun the same command to resume"


class _StopSignalError(Exception):
    def __init__(self, number: int) -> None:
        self.exit = EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED


def supervise(
    job: GenerateJob, options: dict[str, Any], grace_s: float = 20.0, log_format: str = LogFormat.TEXT
) -> dict[str, Any]:
    """Run the driver.

    grace_s: after SIGTERM, for the shards in progress. Returns its summary, or if it ended without one the
    counts of OUTPUT; `exit` is always in it."""
    handlers = {number: signal.signal(number, _raise_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _supervise(driver_input(job, options, log_format), job, grace_s)
    finally:
        for number, handler in handlers.items():  # the file's next job may not expect these handlers
            signal.signal(number, handler)


def _supervise(first_line: bytes, job: GenerateJob, grace_s: float) -> dict[str, Any]:
    started = time.monotonic()
    result_fd, driver_fd = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "context_diffusion.cluster.driver_process", str(driver_fd)],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,  # what Ray prints; stdout is for the result
        pass_fds=[driver_fd],
        start_new_session=True,
    )
    os.close(driver_fd)
    try:
        _send(child, first_line)
        text = _read_line(result_fd)
        child.wait()
    except _StopSignalError as stop:
        text = _stop(child, result_fd, grace_s if stop.exit == EXIT_TERMINATED else 0)
        if '"rows"' not in text:  # it has not just finished
            return _partial_summary(job, stop.exit, f"stopped; {RESUME}", started)
    finally:
        os.close(result_fd)
        child.kill()  # if it is still alive its time is over, and it ignores SIGTERM
        end_session(child.pid)
        child.wait()
    if text.strip():
        summary = json.loads(text)
        if "rows" in summary:
            return summary
        return _partial_summary(job, summary["exit"], summary["error"], started)
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"code {child.returncode}"
    error = f"the Ray driver ended with {how} and no result; {RESUME}"
    return _partial_summary(job, EXIT_EXTERNAL, error, started)


def driver_input(job: GenerateJob, options: dict[str, Any], log_format: str = LogFormat.TEXT) -> bytes:
    """Return the first line of the driver's stdin. Keys that the job does not set are left unset, since an
    unset part of a model is its preset's."""
    values = {
        "job": job.model_dump(mode="json", exclude_unset=True),
        "options": options,
        "log_format": log_format,
    }
    return json.dumps(values).encode() + b"\n"


def _send(child: subprocess.Popen[bytes], line: bytes) -> None:
    assert child.stdin
    child.stdin.write(line)
    child.stdin.flush()


def _raise_stop(number: int, _frame: Any) -> None:
    raise _StopSignalError(number)


def _read_line(result_fd: int, limit_s: float | None = None) -> str:
    """Read the driver's result; "" if it ends without one, or not within the limit."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    data = b""
    while not data.endswith(b"\n"):
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        if not select.select([result_fd], [], [], left)[0]:
            break
        chunk = os.read(result_fd, 65536)
        if not chunk:
            break
        data += chunk
    return data.decode()


def _stop(child: subprocess.Popen[bytes], result_fd: int, grace_s: float) -> str:
    """Ask the driver to start no further shard, and wait for its result. A second signal ends the wait."""
    if grace_s <= 0 or child.poll() is not None:
        return ""
    try:
        _send(child, b"stop\n")
        return _read_line(result_fd, grace_s)
    except (_StopSignalError, BrokenPipeError):
        return ""


def end_session(session: int, spared: int | None = None) -> None:
    """End the processes of a session: the driver and the Ray that it started. First SIGTERM, then SIGKILL.

    spared: a process that is left alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_S
        while (pids := [pid for pid in _members(session) if pid != spared]) and time.monotonic() < deadline:
            for pid in pids:
                _kill(pid, number)
            time.sleep(0.1)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _members(session: int) -> list[int]:
    """Return the living processes of a session, from /proc: state and session are the third and sixth field
    of stat."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            pids.append(int(path.parent.name))
    return pids


def _partial_summary(job: GenerateJob, code: int, error: str, started: float) -> dict[str, Any]:
    """Return the summary of a run that has none, with the counts of the parts in OUTPUT."""
    output = Output(normal(job.output), Storage(job.storage_options, deadline_s=5))
    summary: dict[str, Any] = {"output": output.root, "rows": 0, "ok": 0, "failed": 0, "images": 0}
    try:
        counts = output.count()
        summary |= {"rows": counts.rows, "ok": counts.ok, "failed": counts.failed, "images": counts.images}
    except ConfigError:  # `error` is the same
        pass
    except Exception as count_error:
        error += f" (OUTPUT could not be counted: {count_error})"
    seconds = round(time.monotonic() - started, 2)
    return {
        **summary,
        "skipped": 0,
        "seconds": seconds,
        "images_per_second": 0.0,
        "exit": code,
        "error": error,
    }
