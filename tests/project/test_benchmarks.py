"""The measurement for GPUs runs, in small, where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
PARTS = r"load [\d.]+ s, 4 rows in [\d.]+ s: .* encode [\d.]+ s, \d+ steps [\d.]+ s .* decode [\d.]+ s"
# By kind of rows, how many of four diffusers runs in its largest batch.
STABLE_DIFFUSION = {"uniform": 4, "unguided": 4, "mixed": 4, "mixed sizes": 2}
KLEIN = {
    "uniform": 1,
    "shared references": 4,
    "mixed steps": 1,
    "mixed references": 1,
    "mixed sizes": 1,
    "mixed steps and references": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kinds"), [("flux2-klein", KLEIN), ("sd15", STABLE_DIFFUSION), ("sdxl", STABLE_DIFFUSION)]
)
def test_the_gpu_benchmark_runs_in_small_on_a_cpu(model: str, kinds: dict[str, int]) -> None:
    options = ["--tiny", "--model", model, "--rows", "4", "--batches", "4", "--device", "cpu"]
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        timeout=600,
        # Threads that wait for each other crawl beside another process.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout
    assert f"{model}: matrix products" in lines
    assert re.search(f"engine, eager: {PARTS}", lines)
    for kind, batch in kinds.items():
        assert re.search(rf"engine, eager, {kind}: [\d.]+ images/s, occupancy [\d.]+$", lines, re.MULTILINE)
        assert re.search(
            rf"diffusers, eager, {kind}, batches of {batch}: [\d.]+ images/s$", lines, re.MULTILINE
        )
    assert "equal to the bit: 8 of 8" in lines
    assert "eager, peak memory" in lines
    assert "engine to diffusers, both eager: uniform" in lines
    # Both sides make the same images: otherwise they would not do the same work.
    [mean, most] = re.findall(r"differ by ([\d.]+) of 255 in the mean, (\d+) at most", lines)[0]
    assert float(mean) < 0.1
    assert int(most) <= 1
