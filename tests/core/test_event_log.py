"""What a run tells on stderr: lines for people, or events as JSON, each with the ids that one looks for."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from context_diffusion.cluster import progress
from context_diffusion.cluster.progress import RunProgress
from context_diffusion.core import event_log
from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.core.records import Counts
from support.finished_output import make

PROMPT = "[bold]no markup[/bold] :smile: " + "long " * 60


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a run tells from now on; each shard is time for a line."""
    sink = io.StringIO()
    monkeypatch.setattr(LOG, "console", Console(file=sink, width=80))
    monkeypatch.setattr(LOG, "job", "s3://bucket/out")
    monkeypatch.setattr(progress, "EVERY_SECONDS", -1.0)
    return sink


def watched(folder: Path) -> RunProgress:
    """Progress over two real shards, one row of them failed."""
    heard: list[dict[str, Any]] = []
    make(folder, 8, {5: {"scheduler": PROMPT}}, written=heard, rows_per_part=4)
    with RunProgress(10, Counts(rows=2, ok=2, images=2), "/logs/of/ray") as shown:
        for one in heard:
            shown.add(one)
    return shown


def test_people_read_lines(tmp_path: Path, told: io.StringIO) -> None:
    shown = watched(tmp_path)
    first, *later = told.getvalue().splitlines()
    assert first == "10 rows, 2 done before; Ray's logs: /logs/of/ray"
    assert [line.split(",")[0] for line in later] == ["6/10 rows", "10/10 rows"]
    assert [line.split(",")[-1] for line in later] == [" 0 failed", " 0 s left"], "one shard has no pace"
    assert "row-005" not in told.getvalue()
    assert (shown.counts.failed, shown.counts.codes) == (1, {"unknown_scheduler": 1})


def test_machines_read_an_object_a_line(
    tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "format", LogFormat.JSON)
    watched(tmp_path)
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    assert all(line["job"] == "s3://bucket/out" and line["time"].endswith("+00:00") for line in lines)
    names = ["started", "shard", "progress", "row_failed", "shard", "progress"]
    assert [line["event"] for line in lines] == names
    started, shard, going, failed = lines[:4]
    assert (started["rows"], started["done"], started["logs"]) == (10, 2, "/logs/of/ray")
    assert (shard["shard"], shard["rows"], shard["failed"], shard["images"]) == (0, 4, 0, 4)
    assert set(shard["seconds"]) == {"load", "generate", "write"}
    assert (going["rows"], going["of"]) == (6, 10)
    assert "seconds_left" not in going
    assert lines[-1]["seconds_left"] == 0
    assert (failed["level"], failed["shard"], failed["id"], failed["code"]) == (
        "warning",
        1,
        "row-005",
        "unknown_scheduler",
    )
    assert PROMPT[:40] in failed["message"]


def test_a_submitted_jobs_log_is_passed_on(told: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    LOG.relay("a [line] of Ray")
    monkeypatch.setattr(LOG, "format", LogFormat.JSON)
    LOG.relay('{"event": "shard", "shard": 3}')
    LOG.relay("a [line] of Ray")
    first, event, last = told.getvalue().splitlines()
    assert first == json.loads(last)["message"] == "a [line] of Ray"
    assert json.loads(event) == {"event": "shard", "shard": 3}


def test_a_wait_is_reported_again_if_more_than_its_numbers_changed(
    told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "FIRST_S", 0.01)
    monkeypatch.setattr(event_log, "LOOK_S", 0.01)
    reasons = iter(
        ["1 of 2 engines, 0.9 CPUs are free", "1 of 2 engines, 0.6 CPUs are free", "loading", None]
    )
    over = threading.Event()

    def reason() -> str | None:
        text = next(reasons)
        if text is None:
            over.set()
        return text

    with event_log.WaitNotice(reason):
        assert over.wait(10)
    lines = [line.split(": ")[1] for line in told.getvalue().splitlines()]
    assert lines == ["1 of 2 engines, 0.9 CPUs are free", "loading"]
