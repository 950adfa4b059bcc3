"""Starts, waits for and kills drivers (drive.py) in processes of their own; and the stores that they are
pointed to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import s3fs

from support.ceph import ACCESS, SECRET

TESTS = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "context_diffusion"]
# How long a busy machine may take: a test that passes never waits so long, one that fails has failed anyway.
PATIENCE_S = 300.0
ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0", "NO_COLOR": "1"}  # of the command line


def start(job: dict[str, Any], engine: str, **options: bool) -> subprocess.Popen[str]:
    """A driver in a process and session of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "RAY_worker_niceness": "0"}
    said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (`ended` reads it; a pipe could fill up)
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "support" / "drive.py"), engine, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env=environment,
        start_new_session=True,
        text=True,
    )
    process.stderr = said
    assert process.stdin
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    return process


def ended(process: subprocess.Popen[str], timeout: float = 3 * PATIENCE_S) -> dict[str, Any]:
    """Wait for the driver to end, which is killed after `timeout` seconds. Returns what it said last."""
    assert process.stdout
    assert process.stderr
    watchdog = threading.Timer(timeout, end, [process])
    watchdog.start()
    lines = process.stdout.read().strip().splitlines()
    process.wait()
    watchdog.cancel()
    process.stderr.seek(0)
    assert lines, f"the driver ended with {process.returncode} and no word: {process.stderr.read()[-3000:]}"
    return json.loads(lines[-1])


def drive(job: dict[str, Any], engine: str = "quick", **options: bool) -> dict[str, Any]:
    return ended(start(job, engine, **options))


def end(process: subprocess.Popen[str]) -> None:
    """kill -9 of the driver, then of the Ray that it started."""
    from context_diffusion.cluster.supervisor import end_session

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end_session(process.pid)


def wait_for_parts(out: Path, count: int, seconds: float = PATIENCE_S) -> None:
    """Until OUTPUT has so many finished parts."""
    deadline = time.monotonic() + seconds
    while len(list(out.glob("data/*.parquet"))) < count:
        assert time.monotonic() < deadline, f"no {count} parts in {seconds:g} s"
        time.sleep(0.02)


def unavailable(reason: str) -> NoReturn:
    """Ends a test whose means are not here: left out at home, failed in CI, which is to have them."""
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def children(pid: int) -> list[int]:
    """The processes that it started; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def point_to(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, access: str = ACCESS, secret: str = SECRET
) -> None:
    """This process and those that it starts talk to this object store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()
