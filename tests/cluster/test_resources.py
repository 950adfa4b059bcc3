"""How engines and tasks share a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from context_diffusion.cluster.resources import MAX_ENGINES, TASK_CPUS, Resources, share_resources
from context_diffusion.core.errors import ClusterError
from context_diffusion.core.generate_job import GenerateJob


def shares(cpus: float, gpus: float, **cluster: Any) -> Resources:
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": "m.csv", "output": "out", "cluster": cluster}
    )
    return share_resources(job, cpus, gpus)


@pytest.mark.parametrize(
    ("cpus", "gpus", "cluster", "engines", "each"),
    [
        (2, 0, {}, (1, 1), 0),
        (16, 0, {}, (1, 1), 0),
        (16, 4, {}, (4, MAX_ENGINES), 1),
        (16, 4, {"actors": 2}, (2, 2), 1),
        (16, 4, {"gpus_per_actor": 0.5}, (8, MAX_ENGINES), 0.5),
        (16, 4, {"gpus_per_actor": 0.3}, (12, MAX_ENGINES), 0.3),
        (32, 8, {"gpus_per_actor": 2}, (4, MAX_ENGINES), 2),
        (16, 4, {"gpus_per_actor": 0}, (1, 1), 0),
        (16, 1, {"actors": [1, 8]}, (1, 8), 1),
        (16, 0, {"gpus_per_actor": 1, "actors": [1, 8]}, (1, 8), 1),
        (16, 0, {"gpus_per_actor": 1}, (1, MAX_ENGINES), 1),
    ],
)
def test_all_gpus_are_used_else_one_engine_on_cpus(
    cpus: float, gpus: float, cluster: dict[str, Any], engines: tuple[int, int], each: float
) -> None:
    found = shares(cpus, gpus, **cluster)
    assert (found.min_engines, found.max_engines) == engines
    assert found.engine_gpus == each


def test_a_cpu_engine_has_all_but_what_loads_and_writes() -> None:
    assert shares(16, 0).engine_cpus == 14
    assert shares(2, 0).engine_cpus == 1


@given(st.integers(1, 256), st.integers(0, 64), st.none() | st.integers(1, 64))
def test_what_is_given_out_fits_or_is_refused(cpus: int, gpus: int, actors: int | None) -> None:
    try:
        found = shares(cpus, gpus, actors=actors)
    except ClusterError:
        assert actors or cpus < 2 or gpus > 12 * cpus  # an engine has a twentieth of a CPU at least
        return
    assert found.min_engines * found.engine_cpus + found.load_cpus + 2 * TASK_CPUS <= cpus + 0.05
    assert found.min_engines * found.engine_gpus <= gpus
    assert found.engine_cpus >= 0.05


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"actors": [3, 2]}, "minimum"),
        ({"gpus_per_actor": 1.5}, "whole number"),
        ({"actors": [1]}, "at least 2"),
        ({"gpu_per_actor": 1}, "gpu_per_actor"),
    ],
)
def test_nonsense_is_refused(cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shares(8, 1, **cluster)
