"""One run of a generate job: plan, flow, finish. cluster/driver_process.py is its process, which
cluster/supervisor.py starts and watches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from context_diffusion.cluster.progress import RunProgress
from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED, ClusterError, TooManyFailuresError
from context_diffusion.core.event_log import LOG
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Counts
from context_diffusion.core.uris import normal
from context_diffusion.generation.build_stages import build_stages
from context_diffusion.generation.plan import Plan, open_plan
from context_diffusion.inputs.manifest_scan import column_warnings
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.build import write_report
from context_diffusion.storage.filesystem import Storage


@dataclass(frozen=True)
class Options:
    """The options of the command line that apply to a run.

    job_file: as the command named it, for the commands that the report shows.
    """

    address: str | None = None
    accept_change: bool = False
    retry_failed: bool = False
    extend: bool = False
    job_file: str | None = None


def run_generate(
    job: GenerateJob,
    options: Options,
    make_engine: Callable[..., Any] | None = None,
    on_start: Callable[[Any], None] = lambda _: None,
) -> dict[str, Any]:
    """Generate what is missing in OUTPUT and finish it.

    make_engine: for tests; on_start: receives the flow's ledger. Returns the summary, with `exit`."""
    started = time.perf_counter()
    storage = Storage(job.storage_options)
    output = Output(normal(job.output), storage)
    plan = open_plan(job, output, storage, options.accept_change, options.extend, options.retry_failed)
    for line in column_warnings(plan.passed.names):
        LOG.warn(line)
    if options.retry_failed:
        storage.delete(output.success)
    before = output.count()
    counts = before
    occupancy = None
    if not storage.exists(output.success):
        occupancy = _generate_missing(job, options, output, plan, before, make_engine, on_start)
        counts = output.count()
        _check_failures(job, plan, counts)
        if counts.rows != plan.rows:
            message = f"{output.root} has {counts.rows} rows, the manifest {plan.rows}"
            raise ClusterError(f"{message}: rerun the same command to resume")
    seconds = time.perf_counter() - started
    return _finish(options, output, before, counts, seconds, occupancy)


def _generate_missing(
    job: GenerateJob,
    options: Options,
    output: Output,
    plan: Plan,
    before: Counts,
    make_engine: Callable[..., Any] | None,
    on_start: Callable[[Any], None],
) -> float | None:
    """Generate the shards without a part. Returns the occupancy of this run's engines."""
    done = output.finished()
    redo: set[int] = set()
    if options.retry_failed:
        redo = _shards_with_failures(output)
        done -= redo
        before = Counts()
    _check_failures(job, plan, before)
    reads, load, write = build_stages(plan, output, done, frozenset(redo))
    if not reads:
        return None
    # Here, so that an invalid job is refused before Ray is imported.
    from context_diffusion.cluster import dataflow
    from context_diffusion.cluster.metrics import RunMetrics
    from context_diffusion.cluster.ray_session import ray_session

    with (
        ray_session(plan.job.cluster.num_cpus, options.address) as logs,
        RunProgress(plan.rows, before, logs) as progress,
        RunMetrics(output.root, sum(read.shard.rows for read in reads)) as metrics,
        # Closed before Ray is: a thread of an abandoned flow would find Ray gone, and end this process.
        closing(
            dataflow.run_flow(plan.job, reads, load, write, make_engine or _default_engine, on_start)
        ) as flow,
    ):
        for counts in flow:
            progress.add(counts)
            metrics.add(counts)
            _check_failures(job, plan, progress.counts)
        return progress.occupancy


def _default_engine(job: GenerateJob, on_broken: Callable[[BaseException], None]) -> Any:
    from context_diffusion.pipeline import make_engine

    return make_engine(job, on_broken)


def _shards_with_failures(output: Output) -> set[int]:
    return {shard for shard, part in output.read_parts(["status"]) if "failed" in part["status"].to_pylist()}


def _check_failures(job: GenerateJob, plan: Plan, counts: Counts) -> None:
    """Raise TooManyFailuresError if more rows failed than max_failed allows."""
    allowed = job.failures_allowed(plan.rows)
    if counts.failed > allowed:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(counts.codes.items())) or "see data/"
        raise TooManyFailuresError(
            f"{counts.failed} of {plan.rows} rows failed ({codes}), max_failed allows {allowed}; "
            "raise max_failed, or correct the inputs and run with --retry-failed"
        )


def _finish(
    options: Options,
    output: Output,
    before: Counts,
    counts: Counts,
    seconds: float,
    occupancy: float | None,
) -> dict[str, Any]:
    """Write summary.json, report.html, checksums.parquet and at last _SUCCESS, unless OUTPUT is finished.

    Returns the summary."""
    finished = output.storage.exists(output.success)
    images = counts.images - before.images
    summary = {
        "output": output.root,
        **asdict(counts),
        "skipped": before.rows,
        "images_made": images,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 3),
        "occupancy": occupancy,
        "job_file": options.job_file,
        "exit": EXIT_ROWS_FAILED if counts.failed else EXIT_OK,
    }
    if not finished:
        output.storage.replace(output.summary, json.dumps(summary, indent=2).encode())
        write_report(output, summary)
        close(output)
    return summary
