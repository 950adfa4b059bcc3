"""The one Ray Data graph: read -> load -> generate -> write, in which a shard is one block from the first
stage to the last. What it calls are plain callables of generation/stages/ and
generation/fault_ledger.py, which know no Ray."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from context_diffusion.cluster.metrics import EngineMetrics, Metrics
from context_diffusion.cluster.resources import TASK_CPUS, Resources, share_resources
from context_diffusion.cluster.stall_guard import EngineNeeds, StallGuard, missing_engines, state_of
from context_diffusion.core.errors import JobError
from context_diffusion.core.event_log import LOG, WaitNotice
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.uris import normal
from context_diffusion.generation.build_stages import shards_per_actor
from context_diffusion.generation.fault_ledger import GuardedEngine, Ledger
from context_diffusion.generation.stages.generate import Engine, Watched, generate
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.generation.stages.write_shard import WriteShard

EngineFactory = Callable[[GenerateJob, Callable[[BaseException], None]], Engine]
# Options of map_batches: a call takes a whole shard.
WHOLE_SHARD: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
ANSWER_S = 10.0  # the limit for the ledger to answer after an error


class _ShardSource(Datasource):
    """The read tasks of the shards to generate."""

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
    """The ledger's actor. Counts attempts when they start, since an engine that dies cannot."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self._metrics = Metrics("attempts", output=output)
        self._without_gpu = 0
        self._refusal: JobError | None = None

    def hold(self, shard: int) -> None:
        self._metrics.count("attempts", attempt="again" if self.begun(shard) else "first")
        super().hold(shard)

    def lacks_gpu(self) -> None:
        """Record that an engine was given a GPU which its torch cannot use."""
        self._without_gpu += 1

    def without_gpu(self) -> int:
        """Return the number of such engines."""
        return self._without_gpu

    def refuse(self, error: JobError) -> None:
        """Record why an engine cannot start with this job."""
        self._refusal = error

    def refusal(self) -> JobError | None:
        return self._refusal


class _LedgerProxy:
    """The ledger's actor with plain methods that wait for the answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._actor, name)
        return lambda *values: ray.get(method.remote(*values))


class Generate:
    """The actor of an engine. Several shards call it at once."""

    def __init__(self, job: GenerateJob, make_engine: EngineFactory, ledger: Any) -> None:
        self.job = job
        ledger_proxy = _LedgerProxy(ledger)
        engine_id = ray.get_runtime_context().get_actor_id()[:8]
        ledger_proxy.engine_loads(engine_id)
        try:
            engine = make_engine(job, _end_process)
        except JobError as error:
            ledger_proxy.refuse(error)  # Ray tells the driver only its text
            raise
        ledger_proxy.engine_ready(engine_id)
        self.guarded = GuardedEngine(engine, ledger_proxy)
        self.metrics: EngineMetrics | None = None
        if isinstance(engine, Watched):
            if ray.get_gpu_ids() and engine.stats().gpu_bytes is None:
                ledger_proxy.lacks_gpu()
            self.metrics = EngineMetrics(
                engine.stats, normal(job.output), engine_id, ledger_proxy.record_event
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        generated = generate(table, self.guarded, self.job)
        if self.metrics:
            self.metrics.update()  # a short job may end before the next regular update
        return generated


def _end_process(error: BaseException) -> None:
    """End the process of a broken engine (a lost device), so that Ray replaces it and its shards run
    elsewhere."""
    logging.getLogger(__name__).error("the engine is broken, its process ends: %r", error)
    os._exit(70)


def run_flow(
    job: GenerateJob,
    reads: list[ReadShard],
    load: LoadImages,
    write: WriteShard,
    make_engine: EngineFactory,
    on_start: Callable[[Any], None],
) -> Generator[dict[str, Any], None, None]:
    """Generate shards on a Ray that is connected, and yield a row of schema.WRITTEN for each written one.

    on_start: receives the ledger."""
    cluster = ray.cluster_resources()
    resources = share_resources(job, cluster.get("CPU", 0), cluster.get("GPU", 0))
    ledger = ray.remote(num_cpus=0, max_concurrency=64)(_CountedLedger).remote(normal(job.output))
    needs = EngineNeeds(resources.min_engines, resources.engine_cpus, resources.engine_gpus)
    at_once = shards_per_actor(job, {read.file.uri: read.file for read in reads}.values(), load.preprocessing)
    stall_guard = partial(StallGuard, partial(state_of, ledger), job.cluster.no_progress_timeout_s, needs)
    _configure(at_once, stall_guard)
    on_start(_LedgerProxy(ledger))
    loaded = _loaded(reads, load, resources)
    generated = _generated(loaded, job, make_engine, ledger, resources, at_once)
    pool = TaskPoolStrategy(resources.loads)
    written = generated.map_batches(write, **WHOLE_SHARD, num_cpus=TASK_CPUS, compute=pool)
    try:
        with WaitNotice(lambda: missing_engines(state_of(ledger), needs)):
            yield from _rows_of(written, ledger)
    except ray.exceptions.RayError as error:
        if refusal := _refusal(ledger):
            raise refusal from error
        raise
    finally:
        DataContext.get_current().custom_execution_callback_classes = []  # a notebook may run another flow


def _refusal(ledger: Any) -> Exception | None:
    """Return why an engine refused the job; None if none did, or if the ledger is lost too."""
    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(ledger.refusal.remote(), timeout=ANSWER_S)
    return None


def _loaded(reads: list[ReadShard], load: LoadImages, resources: Resources) -> Dataset:
    """Return the stages that read the shards and load their images."""
    shards = ray.data.read_datasource(_ShardSource(reads), override_num_blocks=len(reads), num_cpus=TASK_CPUS)
    pool = TaskPoolStrategy(resources.loads)
    return shards.map_batches(load, **WHOLE_SHARD, num_cpus=resources.load_cpus, compute=pool)


def _generated(
    loaded: Dataset,
    job: GenerateJob,
    make_engine: EngineFactory,
    ledger: Any,
    resources: Resources,
    at_once: int,
) -> Dataset:
    """Return the stage of the engines. at_once: shards that an engine works on."""
    engines = ActorPoolStrategy(
        min_size=resources.min_engines,
        max_size=resources.max_engines,
        max_concurrent_calls_per_actor=at_once,
        max_tasks_in_flight_per_actor=at_once + 1,
        enable_true_multi_threading=True,
    )
    # map_batches refuses GPUs without a batch_size, and a batch is a shard here
    return loaded.map_batches_internal(
        Generate,
        fn_constructor_args=(job, make_engine, ledger),
        **WHOLE_SHARD,
        compute=engines,
        num_cpus=resources.engine_cpus,
        num_gpus=resources.engine_gpus,
        accelerator_type=job.cluster.accelerator_type,
    )


def _rows_of(written: Dataset, ledger: Any) -> Iterator[dict[str, Any]]:
    """Run the graph, yield its rows as they come, and record each as an event of the ledger."""
    # Not iter_batches: its threads outlive an abandoned flow, find Ray gone, and Ray then ends this process.
    for number, bundle in enumerate(written.iter_internal_ref_bundles()):
        if number == 0:
            _warn_without_gpu(ray.get(ledger.without_gpu.remote()))
        ledger.record_event.remote()
        for block in bundle.block_refs:
            yield from ray.get(block).to_pylist()


def _warn_without_gpu(engines: int) -> None:
    """Warn of engines whose GPU torch cannot use. Ray assigns the GPUs that its nodes were started with, also
    such ones."""
    if engines:
        message = f"{engines} engine(s) were given a GPU by Ray, but their torch finds none"
        LOG.warn(f"{message}: they run on the CPU, much slower")


def _configure(at_once: int, stall_guard: Callable[[], StallGuard]) -> None:
    """Set Ray Data's options for the flow. at_once: shards that an engine works on."""
    context = DataContext.get_current()
    context.target_max_block_size = None  # a shard's block is never split
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = [stall_guard]
    # The pool grows when its engines have more shards than they work on. Ray's default of 1.75 would never be
    # reached.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1 + 0.5 / at_once
    context.raise_original_map_exception = True  # else the driver does not get the cause of a stage's error
    context.enable_progress_bars = False
    context.print_on_execution_start = False
