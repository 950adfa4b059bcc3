"""A cluster that grows, shrinks and dies under a job; GPUs are logical here, the engines run on CPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from context_diffusion.ray_jobs import RayJobs
from support.clusters import TOKEN, Cluster, call, start_cluster, wait_for, write_job
from support.hub_server import hub_of
from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import COMMAND
from support.tiny_diffusers import make_base, make_controlnet

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

GPU = {"num_gpus": 1, "resources": {"accelerator_type:L4": 1}}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head alone."""
    yield from start_cluster(nodes=1)


def engines(cluster: Cluster) -> list[dict[str, Any]]:
    """The engines that live now, as Ray's state API lists them."""
    asked = urllib.request.Request(
        f"{cluster.dashboard}/api/v0/actors?limit=1000", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return [one for one in found if one["state"] == "ALIVE" and "Generate" in one["class_name"]]


def test_engines_wait_for_gpus_of_their_kind_grow_with_them_and_leave_a_node_that_is_taken_away(
    cluster: Cluster, tmp_path: Path
) -> None:
    pool = {"actors": [1, 2], "gpus_per_actor": 1, "accelerator_type": "L4"}
    # A node takes half a minute to start, a shard of two rows a quarter of a second at most: enough of them
    # to see it come.
    job = write_job(tmp_path, 1000, rows_per_part=2, cluster=pool)
    parts = tmp_path / "out" / "data"
    code, told, log = call(cluster, "submit", job)
    assert code == 0, log
    time.sleep(15)
    assert not engines(cluster), "there is no GPU yet"
    first = cluster.add(**GPU)
    wait_for(lambda: parts.exists() and len(list(parts.iterdir())) > 2)
    assert [one["node_id"] for one in engines(cluster)] == [first]
    second = cluster.add(**GPU)
    wait_for(lambda: {one["node_id"] for one in engines(cluster)} == {first, second})
    cluster.drain(first, 20)
    time.sleep(20)
    assert len(list(parts.iterdir())) < 500, "there is work left when it goes"
    cluster.lose(first)
    jobs = RayJobs(cluster.dashboard, TOKEN)
    assert jobs.follow(told["submission_id"], print) == 0
    assert len(read_output(tmp_path / "out")) == 1000


def test_engines_whose_number_is_left_open_grow_with_the_gpus(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.add(**GPU)
    job, jobs = write_job(tmp_path, 1000, rows_per_part=2), RayJobs(cluster.dashboard, TOKEN)
    code, submitted, log = call(cluster, "submit", job)
    assert code == 0, log
    wait_for(lambda: list((tmp_path / "out").glob("data/*")))
    assert [one["node_id"] for one in engines(cluster)] == [first]
    second = cluster.add(**GPU)
    wait_for(lambda: sorted(one["node_id"] for one in engines(cluster)) == sorted([first, second]))
    assert jobs.follow(submitted["submission_id"], print) == 0
    assert len(read_output(tmp_path / "out")) == 1000
    assert "but their torch finds none" in jobs.logs(submitted["submission_id"]), "the GPUs are logical"


def test_a_cluster_that_is_lost_ends_the_wait_with_75_and_its_name(cluster: Cluster, tmp_path: Path) -> None:
    job = write_job(tmp_path, 60, rows_per_part=2)
    command = [*COMMAND, "submit", job, "--wait", "--address", cluster.dashboard]
    waiting = subprocess.Popen(
        command, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list((tmp_path / "out").glob("data/*")))
    cluster.die()
    out, log = waiting.communicate(timeout=300)
    assert waiting.returncode == json.loads(out.splitlines()[-1])["exit"] == 75
    assert cluster.dashboard in log.splitlines()[-1]
    again = subprocess.run([*COMMAND, "status", str(tmp_path / "out")], capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1])["rows"] > 0, "OUTPUT tells it without the cluster"


def test_weights_are_fetched_once_for_two_nodes_and_then_by_no_engine(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.add()
    for name, made in (("base", make_base(tmp_path / "made")), ("net", make_controlnet(tmp_path / "made"))):
        shutil.copytree(made, tmp_path / "hub" / "someone" / name)
    values = job_values(write_manifest(tmp_path / "in", 3), tmp_path / "out")
    values |= {
        "model": {"base": "someone/base", "controlnet": "someone/net"},
        "control": "canny",
        "settings": {"num_inference_steps": 2},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    with hub_of(tmp_path / "hub") as (endpoint, fetched):
        variables = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        jobs, lines = RayJobs(cluster.dashboard, TOKEN), list[str]()
        jobs.submit(
            "warm-1", f"python -m context_diffusion warm {job} --address auto", {"env_vars": variables}
        )
        assert jobs.follow("warm-1", lines.append) == 0, lines
        assert len(json.loads(lines[-1])["nodes"]) == 2
        assert len(fetched) > 8
        assert set(fetched.values()) == {1}, fetched
        options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        code, _, log = call(cluster, "submit", str(job), "--wait", *options, **variables)
        assert code == 0, log
        assert set(fetched.values()) == {1}, fetched
