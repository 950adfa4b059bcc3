"""The longer tests of what survives: random kills, a run that sleeps while another finishes, two runs at
once, a node that dies, faults of Ray's own calls."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from context_diffusion.cluster.supervisor import _members
from support import chaos
from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import drive, ended, start, wait_for_parts

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_that_slept_while_another_finished_changes_nothing(tmp_path: Path) -> None:
    """Every process of it is stopped by SIGSTOP in the middle, its writers too, and woken when all is
    done."""
    out = tmp_path / "out"
    job = job_values(write_manifest(tmp_path / "in", 120), out, rows_per_part=6)
    sleeper = start(job, "slow")
    wait_for_parts(out, 3)
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


def test_a_hundredth_of_rays_own_calls_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way there or back, of every kind of call. What Ray does not survive ends with 75, and goes
    on."""
    faults = {"*": {"num_failures": -1, "req_failure_prob": 1, "resp_failure_prob": 1}}
    monkeypatch.setenv("RAY_testing_rpc_failure", json.dumps(faults))
    out = tmp_path / "out"
    _until_done(job_values(write_manifest(tmp_path / "in", 120), out, rows_per_part=6))
    assert len(read_output(out)) == 120


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes of a CPU each, which RAY_ADDRESS names."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    memory = 200 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory})
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_a_node_that_dies_loses_nothing(tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "out"
    job = job_values(write_manifest(tmp_path / "in", 120), out, rows_per_part=6)
    process = start(job, "slow")
    wait_for_parts(out, 3)
    cluster.remove_node(
        next(node for node in cluster.list_all_nodes() if not node.head), allow_graceful=False
    )
    told = ended(process)
    if told["exit"]:
        assert told["exit"] == 75, told
        _until_done(job)
    assert len(read_output(out)) == 120


def _until_done(job: dict[str, Any]) -> None:
    """The same command again while it ends with 75."""
    codes: list[int] = []
    while not codes or (codes[-1] == 75 and len(codes) < 4):
        codes.append((told := drive(job))["exit"])
    assert codes[-1] == 0, (codes, told)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> chaos.Chaos:
    return chaos.undisturbed(tmp_path_factory.mktemp("chaos"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(20))
def test_twenty_kills_lose_and_double_nothing(calm: chaos.Chaos, number: int) -> None:
    """Each victim in turn, at a random moment; CHAOS_SEED gives other moments."""
    one = dataclasses.replace(calm, out=calm.folder / f"out-{number}")
    found = one.finish(chaos.strike(one, number, seed=int(os.environ.get("CHAOS_SEED", "0"))))
    assert found["wrong"] == [], found
