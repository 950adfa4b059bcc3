"""Starts, waits for and kills drivers (drive.py) in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def start(job: dict[str, Any], engine: str, **options: bool) -> subprocess.Popen[str]:
    """A driver in a process and session of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "RAY_worker_niceness": "0"}
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "drive.py"), engine, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
    )
    assert process.stdin
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    return process


def ended(process: subprocess.Popen[str], timeout: float = 120) -> dict[str, Any]:
    """What the driver said last."""
    assert process.stdout
    lines = process.stdout.read().strip().splitlines()
    process.wait(timeout=timeout)
    return json.loads(lines[-1])


def drive(job: dict[str, Any], engine: str = "quick", **options: bool) -> dict[str, Any]:
    return ended(start(job, engine, **options))


def end(process: subprocess.Popen[str]) -> None:
    """kill -9 of the driver, then of the Ray that it started."""
    from context_diffusion.supervise import end_session

    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end_session(process.pid)
