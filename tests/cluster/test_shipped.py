"""The package travels with the job to a cluster whose environment lacks it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clusters import Cluster, call, start_cluster, write_job
from support.output_reader import read_output

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All that the package needs, and not the package: a folder on sys.path has its .pth files ignored, an
    editable install's among them."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(found.stdout.strip(), "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert subprocess.run([python, "-c", "import ray, torch"], check=True)
    assert subprocess.run([python, "-c", "import context_diffusion"], capture_output=True).returncode == 1
    yield from start_cluster(python)


def test_a_wheel_that_is_sent_along_is_what_the_job_runs(bare: Cluster, tmp_path: Path) -> None:
    job = write_job(tmp_path, 4)
    code, told, log = call(bare, "submit", job, "--wait")
    assert code == told["exit"] == 2
    assert "bin/python, the Python of this cluster, lacks context_diffusion" in log
    assert "--wheel FILE" in log
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    code, told, log = call(bare, "submit", job, "--wait", "--wheel", str(wheel))
    assert code == 0, log
    assert told["submission_id"].endswith("-2")
    assert len(read_output(tmp_path / "out")) == 4
