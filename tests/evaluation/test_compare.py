"""Two systems over the same rows, and distances to reference pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
from PIL import Image

from context_diffusion.core.errors import ConfigError, JobError
from context_diffusion.evaluation.compare import compared, sign_test
from context_diffusion.outputs.finalize import close
from support.evaluate_job import CHEAP, evaluate
from support.finished_output import make
from support.held_out import held_out_rows

ROWS = 12


def test_rows_are_paired_by_id_and_a_leakage_is_better_where_it_is_lower() -> None:
    ours = [
        {"id": "a", "layout_score": 0.2},
        {"id": "a", "layout_score": 0.6},
        {"id": "b", "layout_score": 0.9},
    ]
    theirs = [
        {"id": "b", "layout_score": 0.5},
        {"id": "a", "layout_score": 0.1},
        {"id": "c", "layout_score": 0.0},
    ]
    told = compared(ours, theirs, ["layout_score", "style_score"])
    assert told["style_score"] == {"rows": 0}
    layout = told["layout_score"]
    assert [layout[key] for key in ("rows", "better", "worse", "equal", "p")] == [2, 2, 0, 0, 0.5]
    assert (layout["mean"], layout["compared"], layout["difference"]) == pytest.approx((0.65, 0.3, 0.35))
    leaked = [
        [{"id": row["id"], "layout_leakage": row["layout_score"]} for row in of] for of in (ours, theirs)
    ]
    assert compared(*leaked, ["layout_leakage"])["layout_leakage"]["worse"] == 2


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (3, 3), (1, 9), (30, 12), (5200, 4800)])
def test_the_sign_test_is_scipys(better: int, worse: int) -> None:
    expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def systems(tmp_path: Path) -> dict[str, Any]:
    """a/: the true pictures; b/: the queries for them, but one is missing; a manifest, with a column of
    pictures in the style."""
    lines, rows = [], held_out_rows()
    for name in ("a", "b", "true/deep"):
        (tmp_path / name).mkdir(parents=True)
    for number, row in enumerate(rows[:ROWS]):
        Image.fromarray(row.truth).save(tmp_path / "a" / f"r{number}.png")
        Image.fromarray(row.query).save(tmp_path / "b" / f"r{number}.png")
        Image.fromarray(row.query).save(tmp_path / f"q{number}.png")
        Image.fromarray(row.contexts[0]).save(tmp_path / f"c{number}.png")
        Image.fromarray(row.contexts[0]).save(tmp_path / "true" / "deep" / f"t{number}.png")
        told = {
            "id": f"r{number}",
            "query": f"q{number}.png",
            "context": f"c{number}.png",
            "prompt": f"tree {number}",
        }
        lines.append(told | {"wanted": f"true/deep/t{number}.png"})
    (tmp_path / "b" / "r0.png").unlink()
    (tmp_path / "true" / "broken.png").write_bytes(b"none")
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return {
        "images": str(tmp_path / "a"),
        "compare": str(tmp_path / "b"),
        "manifest": str(tmp_path / "m.jsonl"),
        "score": CHEAP,
    }


def test_two_systems_stand_in_one_table(systems: dict[str, Any], tmp_path: Path) -> None:
    summary, rows = evaluate(tmp_path, **systems, reference=str(tmp_path / "true"))
    other = summary["compare"]
    assert (summary["ok"], other["ok"], other["codes"], summary["exit"]) == (
        ROWS,
        ROWS - 1,
        {"missing_file": 1},
        3,
    )
    theirs = pq.read_table(tmp_path / "scores" / "compare.parquet").to_pylist()
    for column, told in other["scores"].items():
        pairs = [
            (a[column], b[column])
            for a, b in zip(rows, theirs, strict=True)
            if None not in (a[column], b[column])
        ]
        ours, their = np.array(pairs).T
        assert told["rows"] == len(pairs) >= 8
        assert told["difference"] == pytest.approx(ours.mean() - their.mean(), abs=1e-6)
    style = other["scores"]["style_score"]
    assert style["better"] >= ROWS - 2
    assert style["p"] < 0.01
    assert style["difference"] > 0 > other["scores"]["layout_score"]["difference"], (
        "queries have their layout, not the style"
    )
    for told in (summary["distances"], other["distances"]):
        assert (told["references"], told["left_out"]) == (ROWS, 1)
        assert "the Fréchet distance is too large" in told["warning"]
    assert (summary["distances"]["pictures"], other["distances"]["pictures"]) == (ROWS, ROWS - 1)
    assert all(summary["distances"][name] < other["distances"][name] for name in ("frechet", "kernel"))


def test_a_column_of_the_manifest_names_the_references(systems: dict[str, Any], tmp_path: Path) -> None:
    own = systems | {"compare": None}
    by_column = evaluate(tmp_path, **own, columns={"reference": "wanted"})[0]["distances"]
    (tmp_path / "true" / "broken.png").unlink()
    by_folder = evaluate(tmp_path, **own, reference=str(tmp_path / "true"))[0]["distances"]
    assert by_column == pytest.approx(by_folder)
    assert "left_out" not in by_column


def test_outputs_of_ours_are_compared_and_referred_to_without_a_manifest(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 5)):
        _, output = make(
            tmp_path / name, 6, {2: {"query": "gone.png"}}, seed=seed, settings={"num_images": 2}
        )
        close(output)
    told = {name: str(tmp_path / name / "out") for name in ("one", "two")}
    summary, _ = evaluate(
        tmp_path, images=told["one"], compare=told["two"], reference=told["one"], score=["layout"]
    )
    assert summary["compare"]["scores"]["layout_score"]["rows"] == 5
    assert summary["distances"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert summary["compare"]["distances"]["frechet"] > 1e-4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"reference": "/nowhere"}, JobError, "/nowhere has 0 images, distances need at least 2"),
        (
            {"reference": "x", "columns": {"reference": "wanted"}},
            ConfigError,
            "takes the place of the key `reference`",
        ),
        ({"compare": "/nowhere"}, JobError, "folder not found: /nowhere"),
        ({"compare": "strangers"}, JobError, "none of the rows of .*a, such as 'r0'"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_is_scored(
    systems: dict[str, Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    if change.get("compare") == "strangers":
        _, output = make(tmp_path / "strangers", 4)
        close(output)
        change = {"compare": output.root}
        systems = {"images": systems["images"], "manifest": systems["manifest"], "score": CHEAP}
    with pytest.raises(error, match=words):
        evaluate(tmp_path, **(systems | change))
    assert not (tmp_path / "scores").exists()
