"""A pool of engines whose number is left open, on a cluster that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import PATIENCE_S, TESTS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

RUN = """
import json, sys
import ray
from support import fakes
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.cluster.driver import Options, run_generate
ray.init(address="local", num_cpus=4, num_gpus=2, object_store_memory=2**28, include_dashboard=False)
print(json.dumps(run_generate(GenerateJob.model_validate(json.load(sys.stdin)), Options(), fakes.slow)))
"""


def test_a_pool_that_asks_for_more_engines_than_there_will_ever_be_still_ends(tmp_path: Path) -> None:
    """Two GPUs of which .4 each are left: .8 in sum, so Ray Data asks for a third engine of .6, which no GPU
    holds."""
    job = job_values(write_manifest(tmp_path / "in", 200), tmp_path / "out")
    job |= {"rows_per_part": 5, "cluster": {"gpus_per_actor": 0.6}}
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(job),
        env=os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["ok"] == 200
    assert len(read_output(tmp_path / "out")) == 200
