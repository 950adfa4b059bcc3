"""Jobs on a cluster through Ray's Jobs API: submitted, joined, stopped, resumed, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from support.clusters import Cluster, call, write_job
from support.output_reader import read_output
from support.processes import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_job_is_followed_to_its_end_and_submitted_again_it_is_resumed(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = write_job(tmp_path, 6, {2: {"scheduler": "magic"}})
    code, told, log = call(cluster, "submit", job, "--wait")
    assert code == told["exit"] == 3, log
    assert not told["attached"]
    assert "6/6 rows" in log
    assert sorted(row["id"] for row in read_output(tmp_path / "out")) == [
        f"row-{number:03d}" for number in range(6)
    ]
    code, found, log = call(cluster, "status", told["submission_id"])
    assert (code, found["submission"]["status"], found["submission"]["driver_exit_code"]) == (0, "FAILED", 3)
    assert (found["finished"], found["rows"], found["failed"]) == (True, 6, 1)
    code, again, _ = call(cluster, "submit", job, "--wait")
    assert (code, again["attached"]) == (3, False)
    assert again["submission_id"] == told["submission_id"][:-1] + "2"


def test_while_it_runs_it_is_joined_then_stopped_and_goes_on_as_another_attempt(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = write_job(tmp_path, 30, rows_per_part=2, seed=1)
    code, first, _ = call(cluster, "submit", job)
    assert (code, first["attached"]) == (0, False)
    code, second, log = call(cluster, "submit", job)
    assert (code, second["attached"], second["submission_id"]) == (0, True, first["submission_id"])
    code, _, log = call(cluster, "submit", job, "--set", "seed=2")
    assert code == 2
    assert first["submission_id"] in log
    deadline = time.monotonic() + PATIENCE_S
    while not list((tmp_path / "out").glob("data/*")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert call(cluster, "stop", first["submission_id"])[1]["stopped"]
    while call(cluster, "status", first["submission_id"])[1]["submission"]["status"] in (
        "RUNNING",
        "PENDING",
    ):
        assert time.monotonic() < deadline
    code, found, _ = call(cluster, "status", str(tmp_path / "out"))
    assert code == 0
    assert not found["finished"]
    assert 0 < found["rows"] < 30
    code, third, log = call(cluster, "submit", job, "--wait")
    assert (code, third["submission_id"]) == (0, first["submission_id"][:-1] + "2"), log
    assert len(read_output(tmp_path / "out")) == 30


def test_several_jobs_are_one_submission_named_after_the_first_that_generates(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Path(write_job(tmp_path, 4, matrix={"guidance_scale": [1, 3]}))
    evaluate = {
        "kind": "evaluate",
        "images": str(tmp_path / "out"),
        "output": str(tmp_path / "scores"),
        "score": ["layout"],
    }
    job.write_text(f"{job.read_text()}---\n{yaml.safe_dump(evaluate)}")
    code, told, log = call(cluster, "submit", str(job), "--wait")
    assert (code, told["exit"], told["output"]) == (0, 0, str(tmp_path / "out")), log
    assert "job 2 of 2: evaluate" in log
    assert told["submission_id"].startswith("out-")
    code, found, _ = call(cluster, "status", told["submission_id"])
    assert (code, found["finished"], found["rows"], found["images"]) == (0, True, 4, 8)
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["images"] == 8
    code, again, _ = call(cluster, "submit", str(job), "--set", "score=[style]")
    assert (code, again["submission_id"] == told["submission_id"]) == (0, False), (
        "another job, as its id says"
    )


def test_what_is_wrong_is_told(cluster: Cluster, tmp_path: Path) -> None:
    job = write_job(tmp_path, 4)
    code, told, log = call(cluster, "submit", job, RAY_AUTH_TOKEN="another-token")
    assert code == told["exit"] == 75
    assert "RAY_AUTH_TOKEN" in log
    assert call(cluster, "status", "nothing-of-the-kind")[0] == 2
    code, _, log = call(cluster, "stop", "nothing-of-the-kind")
    assert code == 75
    assert "has no job nothing-of-the-kind" in log
    code, told, log = call(cluster, "submit", job, "--set", "manifest=/nowhere/at/all.parquet", "--wait")
    assert code == told["exit"] == 2
    assert "/nowhere/at/all.parquet" in log


def test_a_small_file_of_the_standard_library_is_all_that_an_orchestrator_needs(
    cluster: Cluster, tmp_path: Path
) -> None:
    from context_diffusion import ray_jobs

    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('ray_jobs', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['ray_jobs'] = module\n"
        "spec.loader.exec_module(module)\n"
        "jobs = module.RayJobs(sys.argv[2], module.known_token())\n"
        "assert jobs.submit('plain-1', 'echo hello; exit 7')\n"
        "assert not jobs.submit('plain-1', 'echo hello; exit 7')\n"
        "assert jobs.follow('plain-1', print, 0.5) == 7\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, ray_jobs.__file__, cluster.dashboard],
        capture_output=True,
        text=True,
        env={"RAY_AUTH_TOKEN": cluster.environment["RAY_AUTH_TOKEN"], "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout
