"""The steps that every orchestrator calls, at the cluster itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs
from support.clusters import TOKEN, Cluster, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_night_from_a_missing_manifest_to_a_published_output(cluster: Cluster, tmp_path: Path) -> None:
    jobs = RayJobs(cluster.dashboard, TOKEN)
    write_job(tmp_path / "2026-11-27", 8, {1: {"scheduler": "magic"}})
    values = yaml.safe_load((tmp_path / "2026-11-27" / "job.yaml").read_text())
    values["manifest"] = values["manifest"].replace("2026-11-27", "{day}")
    values["output"] = values["output"].replace("2026-11-27", "{day}")
    with pytest.raises(nightly.NotReadyError, match="2026-11-28"):
        nightly.check_ready(jobs, nightly.of_day(values, "2026-11-28"))
    job = nightly.of_day(values, "2026-11-27")
    assert nightly.check_ready(jobs, job)["rows"] == 8
    lines: list[str] = []
    summary = nightly.run(jobs, job, lines.append)
    assert (summary["exit"], summary["rows"], summary["failed"]) == (3, 8, 1)
    assert any("8/8 rows" in line for line in lines)
    with pytest.raises(nightly.WrongJobError, match=r"1 of 8 rows failed, 12\.5%; at most 1\.0% are allowed"):
        nightly.check(summary)
    assert nightly.check(summary, 0.2) == job["output"]
    with pytest.raises(nightly.WrongJobError, match="gdim"):
        nightly.check_ready(jobs, {**job, "settings": {"scheduler": "gdim"}})
