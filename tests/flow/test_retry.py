"""`--retry-failed`: after a corrected manifest, after another `allow`, after a job that was given up. All
other rows stay."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support import fakes
from support.manifests import job_values, rows, write_manifest, write_pictures
from support.output_reader import read_output
from support.processes import COMMAND, ENVIRONMENT, drive
from support.tiny import picture

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


def write(path: Path, table: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))


def test_corrected_cells_and_another_allow_make_the_failed_rows_and_leave_the_others(tmp_path: Path) -> None:
    """Rows without ids: theirs are derived from what they said at first, and stay."""
    manifest, elsewhere = tmp_path / "in" / "rows.jsonl", tmp_path / "elsewhere" / "far.png"
    elsewhere.parent.mkdir()
    Image.fromarray(picture(9)).save(elsewhere)
    table = [
        {name: row[name] for name in ("query", "context", "prompt")}
        for row in rows(12, write_pictures(tmp_path / "in"))
    ]
    table = [row | {"prompt": f"ocean {number}"} for number, row in enumerate(table)]
    right = table[3]["query"]
    table[3]["query"], table[5]["scheduler"], table[9]["query"] = (
        "a-long-name-that-is-not-there.png",
        "magic",
        str(elsewhere),
    )
    table[11]["prompt"] = "x" * 50
    write(manifest, table)
    job = job_values(str(manifest), tmp_path / "out", rows_per_part=4) | {
        "limits": {"max_prompt_characters": 40}
    }
    first = drive(job)
    assert (first["exit"], first.get("failed")) == (3, 4), first
    before = read_output(tmp_path / "out")
    assert next(row for row in before if row["error_code"] == "forbidden_uri")["error_message"].endswith(
        f"`allow: [{tmp_path}/in, {tmp_path}/elsewhere]`, and rerun with --retry-failed"
    )
    table[3]["query"], table[5]["scheduler"] = right, "euler"
    write(manifest, table)
    refused = drive(job)
    assert refused["exit"] == 2
    job |= {"allow": [str(tmp_path / "in"), str(elsewhere.parent)], "limits": {"max_prompt_characters": 60}}
    done = drive(job, retry_failed=True)
    assert (done["exit"], done["ok"], done["failed"]) == (0, 12, 0), done
    after = read_output(tmp_path / "out")
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert after[3]["query"].endswith(right)
    assert after[5]["scheduler"] == "euler"
    changed = [number for number in range(12) if before[number]["created_at"] != after[number]["created_at"]]
    assert changed == [3, 5, 9, 11]
    again = drive(job)
    assert (again["exit"], again["skipped"]) == (0, 12)


def test_why_rows_failed_and_the_next_command_are_told(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "in", 8, {n: {"query": f"no-{n}.png"} for n in (1, 2, 4, 5)})
    job = job_values(manifest, tmp_path / "out")
    assert drive(job)["exit"] == 3
    (path := tmp_path / "job.json").write_text(json.dumps({"kind": "generate"} | job))
    done = subprocess.run([*COMMAND, "run", path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 3
    first, *rows, following, images, report, view = done.stderr.splitlines()[-8:]
    assert first == "4 of 8 rows failed, for example:"
    assert [row.split(":")[:2] for row in rows] == [[f"  row-00{n}", " missing_file"] for n in (1, 2, 4)]
    assert images == f"images: {tmp_path}/out/images"
    assert report == f"report: {tmp_path}/out/report.html"
    assert view == f"view:   context-diffusion view {tmp_path}/out"
    assert following == f"fix the causes, then run: context-diffusion run {path} --retry-failed"


def test_a_job_that_was_given_up_is_finished_by_retry_failed(tmp_path: Path) -> None:
    """Its shards that were never made are made, too."""
    changes = {n: {"query": "no.png"} for n in (0, 1, 2)}
    manifest = write_manifest(tmp_path / "in", 40, changes)
    job = job_values(manifest, tmp_path / "out", rows_per_part=4) | {"max_failed": 2}
    assert drive(job)["exit"] == 4
    parts = len(list((tmp_path / "out" / "data").iterdir()))
    for row in (32, 38):  # shards that may have no part yet, and rows that fail anew
        changes |= {row: {"query": "no.png"}}
    for row in (0, 1, 2):
        changes |= {row: {}}
    write_manifest(tmp_path / "in", 40, changes)
    done = drive(job, retry_failed=True)
    assert (done["exit"], done["rows"]) in ((3, 40), (0, 40)), (parts, done)
    found = {row["id"]: row["status"] for row in read_output(tmp_path / "out")}
    assert [found[f"row-{row:03d}"] for row in (0, 1, 2)] == ["ok"] * 3
    assert len(found) == 40


def test_a_shard_that_another_run_has_corrected_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with --retry-failed, of which one has been faster: no failed row is left where this one means
    to find some."""
    from context_diffusion.cluster import driver
    from context_diffusion.core.generate_job import GenerateJob

    manifest = write_manifest(tmp_path / "in", 12, {3: {"query": "no.png"}})
    job = job_values(manifest, tmp_path / "out", rows_per_part=4)
    assert drive(job)["failed"] == 1
    write_pictures(tmp_path / "in")
    Image.fromarray(picture(9)).save(tmp_path / "in" / "no.png")
    monkeypatch.setattr(driver, "_shards_with_failures", lambda output: output.finished())
    summary = driver.run_generate(
        GenerateJob.model_validate(job), driver.Options(retry_failed=True), fakes.quick
    )
    assert (summary["exit"], summary["ok"]) == (0, 12)
