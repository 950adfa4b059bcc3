"""The evaluate job: on an OUTPUT of ours, on another system's folder, on what is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from context_diffusion.cli.main import app
from context_diffusion.core.errors import (
    ConfigError,
    JobError,
    ManifestError,
    ModelError,
    OutputConflictError,
)
from context_diffusion.core.schema import SCORE_COLUMNS
from context_diffusion.outputs.finalize import close
from support.evaluate_job import CHEAP, evaluate
from support.finished_output import make
from support.held_out import held_out_rows, prompt_of
from support.manifests import write_manifest
from support.tiny import picture


def test_an_output_of_ours_is_scored_row_by_row_failed_rows_and_lost_pictures_told(tmp_path: Path) -> None:
    _, output = make(
        tmp_path, 8, {2: {"scheduler": "magic"}}, settings={"num_images": 2}, score=["layout", "leakage"]
    )
    close(output)
    lost, broken = sorted((tmp_path / "out" / "images").rglob("*.png"))[:2]
    lost.unlink()
    broken.write_bytes(b"not a picture")
    summary, rows = evaluate(tmp_path, images=str(tmp_path / "out"), score=CHEAP)
    assert (summary["rows"], summary["ok"], summary["failed"], summary["images"], summary["exit"]) == (
        8,
        6,
        2,
        12,
        3,
    )
    assert [(row["id"], row["index"]) for row in rows[:3]] == [("row-000", 0), ("row-000", 1), ("row-001", 0)]
    assert summary["codes"] == {"missing_file": 1, "not_an_image": 1, "unknown_scheduler": 1}
    assert "'magic'" in next(row["error_message"] for row in rows if row["error_code"] == "unknown_scheduler")
    written = {(r["id"], r["index"]): r for part in output.read_parts() for r in part[1].to_pylist()}
    for row in rows:
        if row["error_code"] is None:
            assert row["prompt_score"] is None
            assert all(0 <= row[name] <= 1 for name in ("layout_score", "style_score", "layout_leakage"))
            assert row["layout_score"] == pytest.approx(
                written[row["id"], row["index"]]["layout_score"], abs=0.05
            )
    told = summary["scores"]["layout_score"]
    assert (told["count"], told["auc"]) == (12, 1)
    assert told["mean"] > 0.5 > told["shuffled"]


def test_pictures_inside_the_parquet_and_inline_queries_need_the_manifest(tmp_path: Path) -> None:
    manifest = Path(write_manifest(tmp_path / "in", 6))
    rows = pq.read_table(manifest).to_pylist()
    for row in rows:
        row["query"] = {"bytes": (tmp_path / "in" / row["query"]).read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist(rows), manifest)
    _, output = make(tmp_path, image_format="none")
    close(output)
    summary, scored = evaluate(tmp_path, images=output.root, score=CHEAP)
    assert (summary["images"], summary["codes"]) == (0, {"missing_file": 6})
    assert "`manifest:`" in scored[0]["error_message"]
    summary, _ = evaluate(tmp_path, images=output.root, manifest=str(manifest), score=CHEAP)
    assert (summary["images"], summary["exit"], summary["scores"]["layout_score"]["auc"]) == (6, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Another system's: pictures/ and a manifest of theirs. Its pictures are the truth."""
    import numpy as np

    rng, lines = np.random.default_rng(2), []
    (tmp_path / "pictures").mkdir()
    for number, row in enumerate(held_out_rows()[:12:2]):  # every second style has named colours
        Image.fromarray(row.truth).save(tmp_path / "pictures" / f"r{number}.jpg", quality=95)
        Image.fromarray(row.query).save(tmp_path / f"q{number}.png")
        Image.fromarray(row.contexts[0]).save(tmp_path / f"c{number}.png")
        told = {
            "name": f"r{number}",
            "query": f"q{number}.png",
            "context": f"c{number}.png",
            "scheduler": "their own",
        }
        lines.append(told | {"prompt": prompt_of(rng, row.style)})
    (tmp_path / "theirs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def values(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "images": str(folder / "pictures"),
        "manifest": str(folder / "theirs.jsonl"),
        "columns": {"id": "name"},
        **more,
    }


def test_another_systems_folder_is_scored_by_its_manifest(folder: Path) -> None:
    summary, _ = evaluate(folder, **values(folder))
    assert (summary["images"], summary["exit"]) == (6, 0)
    scores = summary["scores"]
    assert list(scores) == list(SCORE_COLUMNS)
    told = {name: scores[name]["auc"] for name in ("layout_score", "style_score", "prompt_score")}
    prompt = told.pop("prompt_score")  # of six rows; test_prompt.py has the bar
    assert min(told.values()) >= 0.9, told
    assert prompt >= 0.75, prompt
    assert all(scores[name]["mean"] < 0.1 for name in ("layout_leakage", "colour_leakage"))
    # What is planted shows: each picture replaced by its context's.
    for number in range(6):
        shutil.copy(folder / f"c{number}.png", folder / "pictures" / f"r{number}.jpg")
    leaked = evaluate(folder, **values(folder, score=["leakage"]))[0]["scores"]
    assert leaked["layout_leakage"]["mean"] > 0.9
    assert leaked["layout_leakage"]["auc"] >= 0.95
    assert leaked["colour_leakage"]["mean"] < 0.1


def test_a_column_may_name_the_pictures_and_missing_ones_are_rows(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "theirs.jsonl").read_text().splitlines()]
    (folder / "pictures" / "r0.jpg").rename(folder / "pictures" / "moved.jpg")
    lines[0]["result"], lines[1]["result"], lines[2]["query"] = "moved.jpg", "../../q1.png", "/etc/hostname"
    (folder / "pictures" / "r3.jpg").unlink()
    lines[4]["context"] = []
    (folder / "theirs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    columns = {"id": "name", "image": "result"}
    summary, rows = evaluate(folder, **values(folder, columns=columns, score=CHEAP))
    told = [row["error_code"] for row in rows]
    assert told == [None, "forbidden_uri", "forbidden_uri", "missing_file", "no_context", None]
    assert summary["exit"] == 3
    assert rows[0]["layout_score"] is not None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": "/nowhere"}, JobError, "folder not found: /nowhere"),
        ({"manifest": None}, JobError, "no plan.json"),
        ({"manifest": "/nowhere.csv"}, ManifestError, "nowhere.csv"),
        ({"columns": {"query": "frage"}}, ManifestError, "missing columns: frage; it has name, query"),
        ({"columns": {"id": "prompt"}, "twice": True}, ManifestError, "duplicate id"),
        ({"columns": {"qeury": "x"}}, ConfigError, "unknown name 'qeury'"),
        ({"score": []}, ConfigError, "score"),
        ({"score": ["beauty"]}, ConfigError, "layout"),
        ({"jugde": "x"}, ConfigError, "did you mean 'judge'"),
        ({"storage_options": {"s3": {"secret": "x"}}}, ConfigError, "is a secret"),
        ({"judge": "/no/such/judge", "score": ["prompt"]}, ModelError, "/no/such/judge"),
    ],
)
def test_a_wrong_job_is_refused_before_anything_is_written(
    folder: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    if change.pop("twice", False):
        lines = (folder / "theirs.jsonl").read_text().splitlines()
        (folder / "theirs.jsonl").write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(error, match=words):
        evaluate(folder, **(values(folder, score=CHEAP) | change))
    assert not (folder / "scores").exists()


def test_an_output_folder_is_not_written_into_and_must_be_finished(tmp_path: Path) -> None:
    _, output = make(tmp_path, 4)
    with pytest.raises(JobError, match="no _SUCCESS"):
        evaluate(tmp_path, images=output.root, score=CHEAP)
    close(output)
    with pytest.raises(OutputConflictError, match="choose another folder"):
        evaluate(tmp_path, images=output.root, output=output.root, score=CHEAP)


def test_the_command_prints_the_summary_and_ends_with_its_code(folder: Path) -> None:
    Image.fromarray(picture(1)).save(folder / "pictures" / "r0.jpg")
    (folder / "pictures" / "r1.jpg").unlink()
    job = {"kind": "evaluate", "output": str(folder / "scores"), **values(folder, score=["layout"])}
    (folder / "job.json").write_text(json.dumps(job))
    done = CliRunner().invoke(app, ["run", str(folder / "job.json")])
    summary = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == summary["exit"] == 3
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
