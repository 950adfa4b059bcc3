"""A run that waits says what for, and ends with the reason where it waits in vain."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from context_diffusion.cluster import stall_guard
from context_diffusion.cluster.stall_guard import EngineNeeds, StallGuard
from context_diffusion.core.errors import ClusterError
from context_diffusion.generation.fault_ledger import Ledger
from support.manifests import job_values, write_manifest
from support.ports import free_port
from support.processes import COMMAND, ENVIRONMENT, PATIENCE_S, ended, start

pytestmark = pytest.mark.ray
STRICT = {"cluster": {"no_progress_timeout_s": 30}}


def run(job: dict[str, Any], engine: str) -> tuple[dict[str, Any], str]:
    """The summary, and what was told on the way."""
    process = start(job, engine)
    summary = ended(process)
    assert process.stderr
    process.stderr.seek(0)
    return summary, process.stderr.read()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_loading_a_model_is_told_and_is_no_standstill(tmp_path: Path) -> None:
    job = job_values(write_manifest(tmp_path / "in", 6), tmp_path / "out", **STRICT)
    summary, log = run(job, "loads_long")
    assert summary["exit"] == 0, summary
    assert "1 engine(s) load the model, 0 of 1 ready" in log


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_an_engine_that_hangs_ends_the_run(tmp_path: Path) -> None:
    job = job_values(write_manifest(tmp_path / "in", 6), tmp_path / "out", **STRICT)
    summary, _ = run(job, "hangs")
    assert summary["exit"] == 75
    assert "shard(s) and finish none" in summary["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_cluster_that_others_hold_is_told(tmp_path: Path) -> None:
    hold = (
        "import ray, sys; ray.init(); ray.get(ray.remote(num_cpus=2)(lambda: "
        "__import__('time').sleep(600)).remote())"
    )
    holding = subprocess.Popen([sys.executable, "-c", hold])
    try:
        ray.init()
        until = time.monotonic() + PATIENCE_S
        while ray.available_resources().get("CPU", 0) > 0.5:
            assert time.monotonic() < until
            time.sleep(0.2)
        summary, log = run(
            job_values(write_manifest(tmp_path / "in", 6), tmp_path / "out", **STRICT), "quick"
        )
    finally:
        ray.shutdown()
        holding.kill()
        holding.wait()
    assert summary["exit"] == 75
    assert "engine(s) start or wait for resources" in summary["error"]
    assert "CPU, 0 of 2 are free" in log


def command(tmp_path: Path, address: str) -> tuple[int, dict[str, Any], str]:
    """`run` with an address: its code, its summary and what it told."""
    manifest = write_manifest(tmp_path / "in", 6)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"kind": "generate", "manifest": manifest, "output": str(tmp_path / "out")}))
    done = subprocess.run(
        [*COMMAND, "run", job, "--address", address], capture_output=True, text=True, env=ENVIRONMENT
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_an_address_where_nothing_listens_ends_with_the_reason(tmp_path: Path) -> None:
    code, summary, log = command(tmp_path, address := f"127.0.0.1:{free_port()}")
    assert code == 75
    assert f"no Ray cluster at {address}: [Errno 111] Connection refused for 20 s" in summary["error"]
    assert f"the Ray cluster at {address} answers" in log
    (tmp_path / "out" / "plan.json").unlink()
    assert command(tmp_path, "http://127.0.0.1:8265")[1]["error"].endswith("`submit` takes http://")


@pytest.mark.slow
def test_a_port_of_something_else_ends_with_the_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: [other.accept() for _ in range(3)], daemon=True).start()
        code, summary, log = command(tmp_path, f"127.0.0.1:{other.getsockname()[1]}")
    assert code == 75
    assert "does not answer as a Ray cluster's head does" in summary["error"]
    assert "8265 is the dashboard's" in summary["error"]
    assert "waiting, " in log


NEEDS = EngineNeeds(1, 1.0, 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of stall_guard.py: it stands unless it is put on."""
    now = [1000.0]
    monkeypatch.setattr(stall_guard.time, "monotonic", lambda: now[0])
    return now


def pass_time(
    clock: list[float], judge: StallGuard, seconds: float, each: Callable[[], object] = lambda: None
) -> None:
    for _ in range(int(seconds / 10)):
        clock[0] += 10
        each()
        judge.on_execution_step(None)


def test_what_goes_on_is_no_standstill(clock: list[float]) -> None:
    ledger = Ledger()
    judge = StallGuard(ledger.state, 600, NEEDS)
    ledger.engine_loads("a")
    pass_time(clock, judge, 3000)
    ledger.engine_ready("a")
    ledger.hold(0)
    pass_time(clock, judge, 3000, lambda: ledger.at_row(0, 1))  # a suspect, row by row
    ledger.release(0)
    pass_time(clock, judge, 3000, ledger.record_event)  # shards are written


def test_what_does_not_is_one(clock: list[float]) -> None:
    ledger = Ledger()
    judge = StallGuard(ledger.state, 600, NEEDS)
    ledger.engine_ready("a")
    ledger.hold(0)
    pass_time(clock, judge, 600)
    with pytest.raises(ClusterError, match=r"engines hold 1 shard\(s\) and finish none"):
        pass_time(clock, judge, 60)
    judge = StallGuard((again := Ledger()).state, 600, NEEDS)
    for _ in range(3):
        again.engine_loads("b")
        pass_time(clock, judge, 300)
    again.engine_loads("b")
    with pytest.raises(ClusterError, match="ended 3 times while it loaded"):
        pass_time(clock, judge, 10)
