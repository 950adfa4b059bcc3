"""Jobs at a head that was started by hand: `ray start --head`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from context_diffusion.ray_jobs import RayJobs, last_line
from support.clusters import TOKEN, Cluster, call, wait_for, write_job
from support.heads import BARE, bare_python, start_head
from support.output_reader import read_output

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with start_head(path=str(Path(sys.executable).parent) + ":" + os.environ["PATH"]) as started:
        yield started


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("data/*.parquet"))


def events_of(log: str) -> dict[str, dict[str, Any]]:
    """The last event of each kind in a log as JSON."""
    told = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return {line["event"]: line for line in told if "event" in line}


def test_a_job_that_is_stopped_finishes_the_shards_it_has_begun(head: Cluster, tmp_path: Path) -> None:
    job = write_job(tmp_path, 800, rows_per_part=100, settings={"num_inference_steps": 50})
    out, jobs = tmp_path / "out", RayJobs(head.dashboard, TOKEN)
    code, submitted, log = call(head, "submit", job, "--log-format", "json")
    assert code == 0, log
    wait_for(lambda: parts_of(out))
    assert call(head, "stop", submitted["submission_id"])[1]["stopped"]
    assert jobs.follow(submitted["submission_id"], print) == 143
    log, stopped = jobs.logs(submitted["submission_id"]), parts_of(out)
    stopping = datetime.fromisoformat(events_of(log)["stopping"]["time"]).timestamp()
    assert max(part.stat().st_mtime for part in stopped) > stopping + 1, (
        "the shards in progress are in OUTPUT"
    )
    assert len(stopped) < 8, "no others were begun"
    summary = last_line(log)
    assert (summary["exit"], summary["rows"] > 100) == (143, True), log
    code, _, log = call(head, "submit", job, "--wait")
    assert code == 0, log
    assert len(read_output(out)) == 800
    assert json.loads((out / "summary.json").read_text())["skipped"] == summary["rows"], (
        "none of those is made again"
    )


def test_a_head_whose_python_on_path_is_another_one_runs_the_job_on_rays_own_and_is_waited_for(
    tmp_path: Path,
) -> None:
    """The head has just begun to start, and neither its PATH nor its folder leads to the Python that Ray runs
    on."""
    job = write_job(tmp_path, 4)
    with start_head(path=f"{bare_python(tmp_path)}:{BARE}") as head:
        wait_for(lambda: listens(head.dashboard), 60)
        code, told, log = call(head, "submit", job, "--wait")
        assert code == told["exit"] == 0, log
        assert len(read_output(tmp_path / "out")) == 4
        code, told, log = call(head, "status", "out", address=f"http://{head.address}")
        assert (code, "not a Ray dashboard" in told["error"], "8265" in told["error"]) == (75, True, True), (
            log
        )
        assert asks_for_a_token(head)


def test_a_run_without_the_clusters_token_says_what_is_missing(head: Cluster, tmp_path: Path) -> None:
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    code, summary, log = call(head, "run", write_job(tmp_path, 4), address=head.address, **settings)
    assert code == 75, log
    assert f"no Ray cluster at {head.address}" in summary["error"]
    assert "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in summary["error"]
    assert "RAY_AUTH_MODE=token" in summary["error"]


def asks_for_a_token(head: Cluster) -> bool:
    settings = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    code, told, _ = call(head, "status", "out", **settings)
    return code == 75 and "none is set here" in told["error"] and "RAY_AUTH_MODE=token" in told["error"]


def listens(address: str) -> bool:
    place = urlsplit(address)
    with socket.socket() as asked:
        return asked.connect_ex((place.hostname or "", place.port or 0)) == 0
