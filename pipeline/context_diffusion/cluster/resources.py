"""How the engines and the tasks of a run share the CPUs and GPUs of a cluster. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from context_diffusion.core.errors import ClusterError
from context_diffusion.core.generate_job import GenerateJob

MAX_ENGINES = 10_000  # of a pool that grows with its cluster, which its GPUs limit
TASK_CPUS = 0.1  # of a read or write task, and of load tasks if CPUs are few: they wait for storage
MIN_ENGINE_CPUS = 0.05


@dataclass(frozen=True)
class Resources:
    """The number of engines, and what each engine and each load task reserves. loads: the most load tasks at
    once."""

    min_engines: int
    max_engines: int
    engine_cpus: float
    engine_gpus: float
    load_cpus: float
    loads: int


def share_resources(job: GenerateJob, cpus: float, gpus: float) -> Resources:
    """Return engines and tasks that fit into the cluster together. Raises ClusterError if they cannot.

    Ray Data hangs without a message if they don't fit (its issue 44687), so this is decided before anything
    starts. Resources by which a cluster may still grow are requested by the pool: with `actors: [least,
    most]`, with `gpus_per_actor`, or for engines on GPUs without a fixed number."""
    settings = job.cluster
    engine_gpus = settings.gpus_per_actor if settings.gpus_per_actor is not None else float(gpus > 0)
    grows = settings.gpus_per_actor is not None or isinstance(settings.actors, list)
    engines, max_engines = _engines(settings.actors, engine_gpus, gpus)
    if engine_gpus and not grows and engines * engine_gpus > gpus:
        needs = f"cluster.actors requires {engines} engines of {engine_gpus:g} GPU each"
        raise ClusterError(f"{needs}, the cluster has {gpus:g} GPUs")
    is_small = cpus < 4
    load_cpus = settings.cpus_per_load or (2 * TASK_CPUS if is_small else 1.0)
    left = cpus - 2 * TASK_CPUS - load_cpus
    if engine_gpus:
        engine_cpus = min(1.0, max(left, MIN_ENGINE_CPUS) / engines)
    else:
        engine_cpus = round(min(left, cpus / 2 if is_small else cpus - 2) / engines, 3)
    if engine_cpus < MIN_ENGINE_CPUS or (engines * engine_cpus > left + 1e-6 and not grows):
        raise ClusterError(
            f"{engines} engine(s) and the tasks that feed them do not fit into a cluster of {cpus:g} CPUs: "
            "lower cluster.actors or add CPUs"
        )
    return Resources(engines, max_engines, round(engine_cpus, 3), engine_gpus, load_cpus, max(1, int(cpus)))


def _engines(actors: int | list[int] | None, engine_gpus: float, gpus: float) -> tuple[int, int]:
    """Return the least and the largest number of engines."""
    if isinstance(actors, list):
        return actors[0], actors[1]
    if actors or not engine_gpus:
        return actors or 1, actors or 1
    # A share of less than one GPU is a share of a single one.
    fitting = int(gpus) * int(1 / engine_gpus + 1e-6) if engine_gpus < 1 else int(gpus / engine_gpus)
    return max(1, fitting), max(fitting, MAX_ENGINES)
