"""A run goes on whatever its names and its manifest's other columns hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from context_diffusion.config import GenerateJob
from context_diffusion.driver import Options, run_generate
from independent import read_output
from inputs import job_values, write_manifest

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
def test_a_metric_that_ray_refuses_is_missed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from context_diffusion.metrics import Metrics

    metrics = Metrics("images", output="/data/josé/日本")
    metrics.count("images", 3)
    assert not caplog.records
    monkeypatch.setattr(metrics._known["images"], "inc", lambda *_: 1 / 0)
    metrics.count("images", 1)
    assert "was not recorded" in caplog.text
