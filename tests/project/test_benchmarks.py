"""The measurement for GPUs runs, in small, where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"


PARTS = r"load [\d.]+ s, 4 rows in [\d.]+ s: .* encode [\d.]+ s, 4 steps [\d.]+ s .* decode [\d.]+ s"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_on_a_cpu() -> None:
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--rows", "4", "--batches", "1", "4", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=600,
        # Threads that wait for each other crawl beside another process.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    sides = re.split("^sdxl: ", finished.stdout, flags=re.MULTILINE)
    assert len(sides) == 2
    for lines in sides:
        assert "matrix products" in lines
        assert re.search(f"engine, eager: {PARTS}", lines)
        for kind in ("uniform", "unguided", "mixed", "mixed sizes"):
            assert re.search(
                rf"engine, eager, {kind}: [\d.]+ images/s, occupancy [\d.]+$", lines, re.MULTILINE
            )
            assert re.search(
                rf"diffusers, eager, {kind}, batches of \d: [\d.]+ images/s$", lines, re.MULTILINE
            )
        assert "equal to the bit: 8 of 8" in lines
        assert "eager, peak memory" in lines
        assert "engine to diffusers, both eager: uniform" in lines
        # Both sides make the same images: otherwise they would not do the same work.
        [mean, most] = re.findall(r"differ by ([\d.]+) of 255 in the mean, (\d+) at most", lines)[0]
        assert float(mean) < 0.1
        assert int(most) <= 1
