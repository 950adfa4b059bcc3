"""A disk that is full or becomes read-only in the middle of a job; real ones, of memory: it takes root to
mount them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import drive, ended, start, wait_for_parts

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS = 120


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount(options): a file system of memory, or other options for the one that stands."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "remount" not in options:
            message = f"no file system can be mounted here: {done.stderr.strip()}"
            pytest.fail(message) if os.environ.get("CI") and os.getuid() == 0 else pytest.skip(message)
        assert done.returncode == 0, done.stderr
        return folder

    yield mounted
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_full_disk_ends_with_75_and_its_reason_and_with_room_all_is_made(
    mount: Callable[[str], Path], tmp_path: Path
) -> None:
    out = mount("size=1200k") / "out"
    job = job_values(write_manifest(tmp_path / "in", ROWS), out, rows_per_part=6)
    told = drive(job)
    assert told["exit"] == 75, told
    assert "No space left" in told["error"]
    assert str(out) in told["error"]
    made = len(list(out.glob("data/*.parquet")))
    assert 0 < made < ROWS / 6
    mount("remount,size=100m")
    told = drive(job)
    assert (told["exit"], told["ok"]) == (0, ROWS), told
    assert told["skipped"] >= 6 * made
    assert len(read_output(out)) == ROWS


def test_a_disk_that_becomes_read_only_ends_with_75_and_later_all_is_made(
    mount: Callable[[str], Path], tmp_path: Path
) -> None:
    out = mount("size=100m") / "out"
    job = job_values(write_manifest(tmp_path / "in", ROWS), out, rows_per_part=6)
    process = start(job, "slow")
    wait_for_parts(out, 3)
    while True:  # no file may be open for writing at that moment
        try:
            mount("remount,ro")
            break
        except AssertionError:
            continue
    told = ended(process)
    assert told["exit"] == 75, told
    assert "Read-only file system" in told["error"]
    mount("remount,rw")
    told = drive(job)
    assert (told["exit"], told["ok"]) == (0, ROWS), told
    assert len(read_output(out)) == ROWS
