"""One Ray for the tests that need none of their own: its start takes longer than most of their jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _ray_here() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_MODE", "disabled")
        patched.setenv("RAY_worker_niceness", "0")
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # its workers import fakes.py
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 2**29})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def shared_ray(_ray_here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS names it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", _ray_here)
