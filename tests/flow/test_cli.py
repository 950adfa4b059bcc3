"""The command line as a scheduler sees it: exit codes, the JSON line, signals, and no Ray before a wrong job
ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from context_diffusion.cluster.supervisor import _members
from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import COMMAND, ENVIRONMENT, PATIENCE_S, children


def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """-> exit code, the JSON of stdout's last line, stderr."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) <= 1, "stdout holds results only"
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def write_job(folder: Path, count: int = 8, **more: Any) -> str:
    values = job_values(
        write_manifest(folder / "in", count, more.pop("changes", None)), folder / "out", **more
    )
    path = folder / "job.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": 1}, "did you mean 'model'"),
        ({"manifest": "nowhere.parquet"}, "nowhere.parquet"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"kind": "paint"}, "'paint' is unknown; did you mean 'train'?"),
    ],
)
def test_a_wrong_job_ends_with_2_before_ray_starts(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    job = write_job(tmp_path)
    Path(job).write_text(json.dumps(json.loads(Path(job).read_text()) | change))
    code, summary, told = call("run", job)
    assert (code, summary["exit"]) == (2, 2)
    assert words in told
    assert "Ray's logs" not in told
    assert not (tmp_path / "out" / "plan.json").exists()


def test_as_json_an_error_is_an_event_too(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    code, _, told = call("run", job, "--log-format", "json", "--set", "manifest=nowhere.parquet")
    [event] = [json.loads(line) for line in told.splitlines()]
    assert (code, event["event"], event["level"], event["job"]) == (
        2,
        "error",
        "error",
        str(tmp_path / "out"),
    )
    assert "nowhere.parquet" in event["error"]


def test_the_help_and_a_wrong_option() -> None:
    assert subprocess.run([*COMMAND, "run", "--help"], capture_output=True, env=ENVIRONMENT).returncode == 0
    assert call("run", "job.yaml", "--sett", "x")[0] == 2
    assert call("status", "/nowhere/at/all")[0] == 2


def test_neither_torch_nor_ray_is_imported_for_what_needs_neither() -> None:
    code = (
        "import sys, context_diffusion.cli.main, context_diffusion.core.job_file, "
        "context_diffusion.generation.plan, "
        "context_diffusion.cluster.supervisor, context_diffusion.cluster.driver, "
        "context_diffusion.generation.validate\n"
        "assert not {'torch', 'ray', 'diffusers', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.ray
def test_a_run_from_validate_to_verify(tmp_path: Path) -> None:
    job = write_job(tmp_path, changes={3: {"scheduler": "magic"}}, score=["layout", "style"])
    code, checked, told = call("validate", job, "--sample", "8")
    assert (code, checked["rows"], len(checked["problems"])) == (3, 8, 1)
    assert "magic" in told
    assert not (tmp_path / "out").exists()

    code, summary, told = call("run", job, "--set", "settings.guidance_scale=1.0", "--log-format", "json")
    assert code == summary["exit"] == 3
    events = [json.loads(line) for line in told.splitlines()]
    told_of = {"started", "shard", "row_failed", "progress", "finished", "rows_failed"}
    assert {one["event"] for one in events} - {"waiting"} == told_of  # a busy machine waits for Ray's start
    assert {one["job"] for one in events} == {str(tmp_path / "out")}
    assert [one["id"] for one in events if one["event"] == "row_failed"] == ["row-003"]
    assert sum(one["rows"] for one in events if one["event"] == "shard") == events[-1]["rows"] == 8
    assert {
        "output",
        "rows",
        "ok",
        "failed",
        "images",
        "skipped",
        "seconds",
        "images_per_second",
        "exit",
    } <= set(summary)
    assert (summary["rows"], summary["ok"], summary["failed"], summary["images"]) == (8, 7, 1, 7)
    rows = read_output(tmp_path / "out")
    assert all(
        0 <= row["layout_score"] <= 1 and 0 <= row["style_score"] <= 1
        for row in rows
        if row["status"] == "ok"
    )
    assert {row["guidance_scale"] for row in rows if row["status"] == "ok"} == {1.0}

    code, summary, _ = call("run", job, "--set", "settings.guidance_scale=1.0")
    assert (code, summary["skipped"]) == (3, 8)
    code, _, told = call("run", job)
    assert (code, "settings.guidance_scale: 1.0 planned, 1.5 now" in told) == (2, True)
    code, found, _ = call("status", str(tmp_path / "out"))
    assert (code, found["finished"], found["rows"], found["codes"]) == (0, True, 8, {"unknown_scheduler": 1})
    assert call("report", str(tmp_path / "out"))[0] == 0
    assert "unknown_scheduler" in (tmp_path / "out" / "report.html").read_text()
    code, _, told = call("verify", str(tmp_path / "out"))
    assert (code, "every file matches its checksum" in told) == (0, True)
    picture = next((tmp_path / "out" / "images").rglob("*.png"))
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    code, _, told = call("verify", str(tmp_path / "out"))
    assert code == 1
    assert picture.name in told


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "code"),
    [(signal.SIGTERM, "supervisor", 143), (signal.SIGINT, "supervisor", 130), (signal.SIGKILL, "driver", 75)],
)
def test_a_stopped_run_says_so_leaves_no_process_and_goes_on(
    tmp_path: Path, number: int, victim: str, code: int
) -> None:
    job = write_job(tmp_path, 60, settings={"num_inference_steps": 30}, rows_per_part=4)
    process = subprocess.Popen(
        [*COMMAND, "run", job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + PATIENCE_S
    while not list((tmp_path / "out").glob("data/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver = children(process.pid)[0]
    os.kill(process.pid if victim == "supervisor" else driver, number)
    out, _ = process.communicate(timeout=PATIENCE_S)
    summary = json.loads(out.strip().splitlines()[-1])
    assert process.returncode == summary["exit"] == code
    assert 0 < summary["rows"] < 60
    assert _members(driver) == [], "processes of the run are left"
    assert call("status", str(tmp_path / "out"))[1]["finished"] is False


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("grace", "least", "most"), [("60", 1, 3), ("0", 0, 1)])
def test_after_sigterm_the_shards_that_were_begun_are_finished_in_their_grace_and_no_other_begins(
    tmp_path: Path, grace: str, least: int, most: int
) -> None:
    job = write_job(tmp_path, 80, settings={"num_inference_steps": 30}, rows_per_part=8)
    command = [*COMMAND, "run", job, "--grace", grace]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    data, deadline = tmp_path / "out" / "data", time.monotonic() + PATIENCE_S
    while not data.exists() or not list(data.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before, told = len(list(data.iterdir())), time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    _, log = process.communicate(timeout=PATIENCE_S)
    print(
        f"grace {grace}: {time.monotonic() - told:.1f} s, {len(list(data.iterdir())) - before} shards"
    )  # for the log
    assert process.returncode == 143
    assert least <= len(list(data.iterdir())) - before <= most
    assert ("the shards in progress are finished first" in log) is (grace != "0")
    assert len(set(pq.read_table(data)["id"].to_pylist())) == 8 * len(list(data.iterdir())), "whole parts"
