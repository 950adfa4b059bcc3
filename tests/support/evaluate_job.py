"""An evaluate job over a folder, and the rows that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.job_file import check_job
from context_diffusion.core.schema import SCORES
from context_diffusion.evaluation.run import run_evaluate

CHEAP = ["layout", "style", "leakage"]  # no torch


def evaluate(folder: Path, **values: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> the summary and the rows of scores.parquet."""
    job = check_job({"kind": "evaluate", "output": str(folder / "scores"), **values})
    assert isinstance(job, EvaluateJob)
    summary = run_evaluate(job)
    table = pq.read_table(folder / "scores" / "scores.parquet")
    assert table.schema.equals(SCORES)
    assert json.loads((folder / "scores" / "summary.json").read_text()) == summary | {"of": values["images"]}
    return summary, table.to_pylist()
