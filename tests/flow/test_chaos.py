"""The longer tests of what survives: random kills, a run that sleeps while another finishes, two runs at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import chaos
from context_diffusion.supervise import _members
from driving import drive, ended, start, wait_for_parts
from independent import read_output
from inputs import job_values, write_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_that_slept_while_another_finished_changes_nothing(tmp_path: Path) -> None:
    """Every process of it is stopped by SIGSTOP in the middle, its writers too, and woken when all is done."""
    out = tmp_path / "out"
    job = job_values(write_manifest(tmp_path / "in", 120), out, rows_per_part=6)
    sleeper = start(job, "slow")
    wait_for_parts(out, 3, seconds=90)
    asleep = _members(sleeper.pid)
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    assert drive(job)["exit"] == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    told = ended(sleeper)
    assert told["exit"] in (0, 75)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    assert {path: after[path] for path in after if path.parent.name == "data" or path.suffix == ".png"} == {
        path: before[path] for path in before if path.parent.name == "data" or path.suffix == ".png"
    }
    assert len(read_output(out)) == 120


def test_two_runs_at_once_make_one_output(tmp_path: Path) -> None:
    for number in range(3):
        out = tmp_path / f"out-{number}"
        job = job_values(write_manifest(tmp_path / "in", 60), out, rows_per_part=6, cluster={"num_cpus": 1})
        runs = [start(job, "quick"), start(job, "quick")]
        assert [ended(one)["exit"] for one in runs] == [0, 0]
        rows = read_output(out)
        assert len({row["id"] for row in rows}) == len(rows) == 60


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> chaos.Chaos:
    return chaos.undisturbed(tmp_path_factory.mktemp("chaos"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(20))
def test_twenty_kills_lose_and_double_nothing(calm: chaos.Chaos, number: int) -> None:
    """Each victim in turn, at a random moment; CHAOS_SEED gives other moments."""
    found = chaos.strike(calm, number, seed=int(os.environ.get("CHAOS_SEED", "0")))
    assert found["wrong"] == [], found
