"""The one Ray Data graph: read -> load -> generate -> write, a shard a block all the way.

Ray stays here: everything that the graph calls is a plain callable of generation/stages.py, generation/write_shard.py and
generation/fault_ledger.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from context_diffusion.cluster.metrics import EngineMetrics, Metrics
from context_diffusion.cluster.stall_guard import Needs, Standstill, ask, awaited
from context_diffusion.core.errors import ClusterError
from context_diffusion.core.event_log import LOG, Waiting
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.uris import normal
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.stages import Engine, LoadImages, ReadShard, Watched, generate
from context_diffusion.generation.write_shard import WriteShard

EngineFactory = Callable[[GenerateJob, Callable[[BaseException], None]], Engine]
MOST = 10_000  # engines of a pool that grows with its cluster: no bound, the cluster's GPUs are one
WHOLE_SHARD: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}  # a call's batch
TASK_CPUS = 0.1  # of a read or write task where CPUs are few: they wait for storage


@dataclass(frozen=True)
class Resources:
    """Engines, from least to most; what each of them and each load task reserves."""

    least: int
    most: int
    engine_cpus: float
    engine_gpus: float
    load_cpus: float
    loads: int


def share_out(job: GenerateJob, cpus: float, gpus: float) -> Resources:
    """Engines and tasks that fit into the cluster together. Raises ClusterError where they cannot.

    Ray Data hangs in silence when they don't fit (its issue 44687), so this is settled before anything starts. What a
    cluster may still grow by is asked for by the pool: `actors: [least, most]`, `gpus_per_actor` said outright, or engines
    on GPUs whose number is left open.
    """
    asked = job.cluster
    each = asked.gpus_per_actor if asked.gpus_per_actor is not None else float(gpus > 0)
    grows = asked.gpus_per_actor is not None or isinstance(asked.actors, list)
    least, most = _actors(asked.actors, each, gpus)
    if each and not grows and least * each > gpus:
        raise ClusterError(f"cluster.actors asks for {least} engines of {each:g} GPU each, the cluster has {gpus:g} GPUs")
    few = cpus < 4
    load_cpus = asked.cpus_per_load or (2 * TASK_CPUS if few else 1.0)
    left = cpus - 2 * TASK_CPUS - load_cpus
    engine_cpus = min(1.0, max(left, 0.05) / least) if each else round(min(left, cpus / 2 if few else cpus - 2) / least, 3)
    if engine_cpus < 0.05 or (least * engine_cpus > left + 1e-6 and not grows):
        raise ClusterError(
            f"{least} engine(s) and the tasks that feed them do not fit into a cluster of {cpus:g} CPUs: "
            "lower cluster.actors or add CPUs"
        )
    return Resources(least, most, round(engine_cpus, 3), each, load_cpus, max(1, int(cpus)))


def _actors(asked: int | list[int] | None, each: float, gpus: float) -> tuple[int, int]:
    if isinstance(asked, list):
        return asked[0], asked[1]
    if asked or not each:
        return asked or 1, asked or 1
    held = int(gpus) * int(1 / each + 1e-6) if each < 1 else int(gpus / each)  # an engine has its share of one GPU alone
    return max(1, held), max(held, MOST)


class _Shards(Datasource):
    """The read tasks of the shards that are left."""

    def __init__(self, reads: list[ReadShard]) -> None:
        super().__init__()
        self._reads = reads

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [ReadTask(read, _metadata(read)) for read in self._reads]


def _metadata(read: ReadShard) -> BlockMetadata:
    return BlockMetadata(num_rows=read.shard.rows, size_bytes=None, input_files=None, exec_stats=None)


class _CountedLedger(Ledger):
    """The ledger's actor: what begins is counted when it does, for an engine that dies can tell no more."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self._metrics = Metrics("attempts", output=output)
        self._without_gpu = 0

    def hold(self, shard: int) -> None:
        self._metrics.count("attempts", attempt="again" if self.begun(shard) else "first")
        super().hold(shard)

    def lacks_gpu(self) -> None:
        """An engine that was given a GPU found none."""
        self._without_gpu += 1

    def without_gpu(self) -> int:
        return self._without_gpu


class _LedgerProxy:
    """The ledger's actor with plain methods that wait for the answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)
        return lambda *values: ray.get(method.remote(*values))


class Generate:
    """The actor: one engine, fed by several shards at once."""

    def __init__(self, job: GenerateJob, make_engine: EngineFactory, ledger: Any) -> None:
        self.job, told = job, _LedgerProxy(ledger)
        own = ray.get_runtime_context().get_actor_id()[:8]
        told.engine_loads(own)
        engine = make_engine(job, _end_process)
        told.engine_ready(own)
        self.guarded = GuardedEngine(engine, told)
        if ray.get_gpu_ids() and isinstance(engine, Watched) and engine.stats().gpu_bytes is None:
            ray.get(ledger.lacks_gpu.remote())
        self.metrics = EngineMetrics(engine.stats, normal(job.output), own) if isinstance(engine, Watched) else None

    def __call__(self, table: pa.Table) -> pa.Table:
        made = generate(table, self.guarded, self.job)
        if self.metrics:
            self.metrics.look()  # its own looks may be further apart than a short job is long
        return made


def _end_process(error: BaseException) -> None:
    """A broken engine (a lost device) ends its process, so that Ray replaces it and its shards run elsewhere."""
    logging.getLogger(__name__).error("the engine is broken, its process ends: %r", error)
    os._exit(70)


def run_flow(
    job: GenerateJob,
    reads: list[ReadShard],
    load: LoadImages,
    write: WriteShard,
    make_engine: EngineFactory,
    started: Callable[[Any], None],
) -> Generator[dict[str, Any], None, None]:
    """Run the shards that are left; yield each written one, as schema.WRITTEN. Ray is up already. started: given the ledger."""
    cluster = ray.cluster_resources()
    resources = share_out(job, cluster.get("CPU", 0), cluster.get("GPU", 0))
    ledger = ray.remote(num_cpus=0, max_concurrency=64)(_CountedLedger).remote(normal(job.output))
    needs = Needs(resources.least, resources.engine_cpus, resources.engine_gpus)
    _configure(job, partial(Standstill, partial(ask, ledger), job.cluster.no_progress_timeout_s, needs))
    started(_LedgerProxy(ledger))
    loaded = _loaded(reads, load, resources)
    generated = _generated(loaded, job, make_engine, ledger, resources)
    written = generated.map_batches(write, **WHOLE_SHARD, num_cpus=TASK_CPUS, compute=TaskPoolStrategy(resources.loads))
    try:
        with Waiting(lambda: awaited(ask(ledger), needs)):
            yield from _rows_of(written, ledger)
    finally:
        DataContext.get_current().custom_execution_callback_classes = []  # a notebook's next flow is not this one's


def _loaded(reads: list[ReadShard], load: LoadImages, resources: Resources) -> Dataset:
    """The shards that are left, with their images."""
    shards = ray.data.read_datasource(_Shards(reads), override_num_blocks=len(reads), num_cpus=TASK_CPUS)
    pool = TaskPoolStrategy(resources.loads)
    return shards.map_batches(load, **WHOLE_SHARD, num_cpus=resources.load_cpus, compute=pool)


def _generated(loaded: Dataset, job: GenerateJob, make_engine: EngineFactory, ledger: Any, resources: Resources) -> Dataset:
    """What the engines make of them."""
    engines = ActorPoolStrategy(
        min_size=resources.least,
        max_size=resources.most,
        max_concurrent_calls_per_actor=job.cluster.shards_per_actor,
        max_tasks_in_flight_per_actor=job.cluster.shards_per_actor + 1,
        enable_true_multi_threading=True,
    )
    return loaded.map_batches_internal(  # map_batches refuses GPUs without a batch_size, and a batch is a shard here
        Generate,
        fn_constructor_args=(job, make_engine, ledger),
        **WHOLE_SHARD,
        compute=engines,
        num_cpus=resources.engine_cpus,
        num_gpus=resources.engine_gpus,
        accelerator_type=job.cluster.accelerator_type,
    )


def _rows_of(written: Dataset, ledger: Any) -> Iterator[dict[str, Any]]:
    """Run the graph; yield its rows as they come, and tell the ledger of each."""
    # Not iter_batches: its threads outlive a flow that is given up, find Ray gone, and Ray then ends this process.
    for number, bundle in enumerate(written.iter_internal_ref_bundles()):
        if number == 0:
            _warn_without_gpu(ray.get(ledger.without_gpu.remote()))
        ledger.record_event.remote()
        for block in bundle.block_refs:
            yield from ray.get(block).to_pylist()


def _warn_without_gpu(engines: int) -> None:
    """Ray gives out what its nodes were started with; whether torch can use that shows in the engines."""
    if engines:
        message = f"{engines} engine(s) have a GPU of Ray's on which their torch finds none, and run on the CPU, much slower"
        LOG.tell("warning", f"warning: {message}", "warning", message=message)


def _configure(job: GenerateJob, standstill: Callable[[], Standstill]) -> None:
    context = DataContext.get_current()
    context.target_max_block_size = None  # a shard's block is never split
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [standstill]
    # The pool grows when its engines have more shards than they work at; of Ray's own 1.75 ours would never have so many.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1 + 0.5 / job.cluster.shards_per_actor
    context.raise_original_map_exception = True  # else the cause of a stage's error is lost on the way to the driver
    context.enable_progress_bars = False
    context.print_on_execution_start = False
