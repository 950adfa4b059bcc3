"""The measurement for GPUs runs, in small, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_on_a_cpu() -> None:
    told = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--rows", "4", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
        },  # threads that wait for each other crawl beside another process
    )
    assert told.returncode == 0, told.stderr
    for model in ("sd15", "sdxl"):
        assert f"{model}: matrix products" in told.stdout
    assert told.stdout.count("engine to diffusers: uniform") == 2
    assert told.stdout.count("equal to the bit: 16 of 16") == 2
