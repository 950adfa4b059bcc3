"""A run goes on whatever its names and its manifest's other columns hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from context_diffusion.cluster.driver import Options, run_generate
from context_diffusion.core.generate_job import GenerateJob
from support.manifests import job_values, write_manifest
from support.output_reader import read_output

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("shared_ray")
def test_an_output_whose_name_is_not_ascii_is_made(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "in", 8)
    output = tmp_path / "josé" / "日本"
    job = GenerateJob.model_validate(job_values(manifest, output, settings={"num_inference_steps": 1}))
    summary = run_generate(job, Options())
    assert (summary["ok"], summary["exit"]) == (8, 0)
    assert len(read_output(output)) == 8


@pytest.mark.usefixtures("shared_ray")
def test_a_metric_that_ray_refuses_is_missed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from context_diffusion.cluster.metrics import Metrics

    metrics = Metrics("images", output="/data/josé/日本")
    metrics.count("images", 3)
    assert not caplog.records
    monkeypatch.setattr(metrics._metrics["images"], "inc", lambda *_: 1 / 0)
    metrics.count("images", 1)
    assert "was not recorded" in caplog.text


@pytest.mark.usefixtures("shared_ray")
def test_columns_of_any_type_go_through_a_run(tmp_path: Path) -> None:
    from ray.data.extensions import ArrowTensorArray

    table = pq.read_table(write_manifest(tmp_path / "in", 8))
    late = pa.array([300_000_000_000_000] * 8, pa.timestamp("ms"))
    table = table.append_column("late", late).append_column(
        "day", pa.array(range(8), pa.int32()).cast(pa.date32())
    )
    table = table.append_column("tensor", ArrowTensorArray.from_numpy(np.arange(32).reshape(8, 2, 2)))
    fixed = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(16, dtype=np.int32).reshape(8, 2))
    table = table.append_column("fixed", fixed)
    pq.write_table(table, tmp_path / "in" / "odd.parquet")
    values = job_values(
        str(tmp_path / "in" / "odd.parquet"), tmp_path / "out", settings={"num_inference_steps": 1}
    )
    assert run_generate(GenerateJob.model_validate(values), Options())["exit"] == 0
    parts = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out" / "data").iterdir())])
    assert len(parts) == 8
    assert set(parts["late"].cast(pa.int64()).to_pylist()) == {300_000_000_000_000}
    assert sorted(parts["fixed"].to_pylist()) == [[2 * n, 2 * n + 1] for n in range(8)]
    assert len(parts["tensor"]) == len(parts["day"]) == 8
