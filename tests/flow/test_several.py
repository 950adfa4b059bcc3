"""A sweep and its evaluation from one file, on a real Ray and a real, tiny model: made, mended, scored."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from context_diffusion import ContextDiffusion
from context_diffusion.core.records import Result
from support.manifests import write_manifest, write_pictures
from support.output_reader import plan_rows, read_output
from support.processes import COMMAND, ENVIRONMENT
from support.tiny import tiny_model

JOB = Path(__file__).parents[2] / "jobs" / "generate_and_evaluate.yaml"
GRID = [(1.0, 0.3), (1.0, 1.0), (4.0, 0.3), (4.0, 1.0)]


def run(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """The example on a small manifest: exit code, the JSON of stdout's last line, stderr."""
    generate, evaluate = yaml.safe_load_all(JOB.read_text())
    generate |= {"manifest": str(folder / "in" / "manifest.parquet"), "output": str(folder / "out")}
    generate |= {
        "model": str(folder / "model"),
        "matrix": {"guidance_scale": [1, 4], "context_scale": [0.3, 1]},
    }
    evaluate |= {
        "images": str(folder / "out"),
        "output": str(folder / "scores"),
        "score": ["layout", "style"],
    }
    (folder / "job.yaml").write_text(yaml.safe_dump_all([generate, evaluate], sort_keys=False))
    options = ["--set", "cluster={num_cpus: 2, no_progress_timeout_s: 120}"]
    command = [*COMMAND, "run", str(folder / "job.yaml"), *options, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=420)
    [line] = done.stdout.strip().splitlines()
    return done.returncode, json.loads(line), done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_is_made_and_scored_and_a_mended_row_is_swept_too(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "in", 4, {1: {"query": "later.png"}})
    tiny_model().save_pretrained(tmp_path / "model")
    code, told, log = run(tmp_path)
    assert code == told["exit"] == 3, log
    assert [(job["exit"], job["rows"], job["failed"], job["images"]) for job in told["jobs"]] == [
        (3, 4, 1, 12),
        (3, 4, 1, 12),
    ]
    made = {(row["id"], row["index"]): row for row in read_output(tmp_path / "out")}
    assert plan_rows(tmp_path / "out") == 4
    assert {row["status"] for (name, _), row in made.items() if name == "row-001"} == {"failed"}

    write_pictures(tmp_path / "in", 7)
    (tmp_path / "in" / "picture-6.png").rename(tmp_path / "in" / "later.png")
    code, told, log = run(tmp_path, "--retry-failed")
    assert code == told["exit"] == 0, log
    assert [(job["exit"], job["rows"], job["images"]) for job in told["jobs"]] == [(0, 4, 16), (0, 4, 16)]
    rows = read_output(tmp_path / "out")
    assert [(row["id"], row["index"]) for row in rows] == [
        (f"row-{n:03d}", k) for n in range(4) for k in range(4)
    ]
    for row in rows:
        if row["id"] != "row-001":
            assert row["sha256"] == made[row["id"], row["index"]]["sha256"], "what was made stays"
    scores = pq.read_table(tmp_path / "scores" / "scores.parquet").to_pylist()
    assert [(row["id"], row["index"]) for row in scores] == [(row["id"], row["index"]) for row in rows]
    assert "<h2>Contact sheets</h2>" in (tmp_path / "out" / "report.html").read_text()

    alone = ContextDiffusion.from_pretrained(str(tmp_path / "model"))
    for row, source in zip(rows, [s for s in pq.read_table(manifest).to_pylist() for _ in GRID], strict=True):
        settings = {name: row[name] for name in ("seed", "num_inference_steps", "scheduler")}
        guidance, weight = GRID[row["index"]]
        contexts = [str(tmp_path / "in" / name) for name in source["context"]]
        settings |= {"guidance_scale": guidance, "context_scale": weight}
        query = str(tmp_path / "in" / source["query"])
        requests = alone.requests(query, contexts, source["prompt"], None, None, "crop", settings)
        # Bits are equal within one chunk size.
        [(_, outcome)] = alone.generate(requests, chunk=row["chunk"])
        assert isinstance(outcome, Result)
        assert np.array_equal(outcome.image, row["pixels"]), (
            "the same picture as that row alone with those settings"
        )
