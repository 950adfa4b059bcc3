"""One run of a generate job: plan, flow, finish. It talks to Ray; cluster/driver_process.py is its process, cluster/supervisor.py
watches over it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from context_diffusion.cluster.progress import Progress
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
    """What the command line adds to a job."""

    address: str | None = None
    accept_change: bool = False
    retry_failed: bool = False
    extend: bool = False


def run_generate(
    job: GenerateJob,
    options: Options,
    make_engine: Callable[..., Any] | None = None,
    on_start: Callable[[Any], None] = lambda _: None,
) -> dict[str, Any]:
    """Makes what is missing of OUTPUT and closes it. -> the summary, `exit` in it. make_engine: the test seam; on_start:
    given the flow's ledger."""
    started = time.perf_counter()
    storage = Storage(job.storage_options)
    output = Output(normal(job.output), storage)
    plan = open_plan(job, output, storage, options.accept_change, options.extend, options.retry_failed)
    for line in column_warnings(plan.passed.names):
        LOG.tell("warning", f"warning: {line}", level="warning", message=line)
    if options.retry_failed:
        storage.delete(output.success)
    counts = before = output.count()
    occupancy = None
    if not storage.exists(output.success):
        occupancy = _make_missing(job, options, output, plan, before, make_engine, on_start)
        _check_failures(job, plan, counts := output.count())
        if counts.rows != plan.rows:
            raise ClusterError(f"{counts.rows} rows in {output.root}, {plan.rows} in the manifest: run it again")
    return _finish(job, output, before, counts, time.perf_counter() - started, occupancy)


def _make_missing(
    job: GenerateJob,
    options: Options,
    output: Output,
    plan: Plan,
    before: Counts,
    make_engine: Callable[..., Any] | None,
    on_start: Callable[[Any], None],
) -> float | None:
    """Make the shards that are left. Returns the occupancy of this run's engines."""
    done, redo = output.finished(), set[int]()
    if options.retry_failed:
        redo = _shards_with_failures(output)
        done -= redo
        before = Counts()
    _check_failures(job, plan, before)
    reads, load, write = build_stages(plan, output, done, frozenset(redo))
    if not reads:
        return None
    from context_diffusion.cluster import dataflow  # here, not above: a wrong job is refused before Ray is imported
    from context_diffusion.cluster.metrics import RunMetrics
    from context_diffusion.cluster.ray_session import ray_session

    with (
        ray_session(plan.job.cluster.num_cpus, options.address) as logs,
        Progress(plan.rows, before, logs) as shown,
        RunMetrics(output.root, sum(read.shard.rows for read in reads)) as metrics,
        # Closed before Ray is: a thread of a flow that is given up would find Ray gone, and end this process.
        closing(dataflow.run_flow(plan.job, reads, load, write, make_engine or _default_engine, on_start)) as flow,
    ):
        for counts in flow:
            for told in (shown, metrics):
                told.add(counts)
            _check_failures(job, plan, shown.counts)
        return shown.occupancy


def _default_engine(job: GenerateJob, broken: Callable[[BaseException], None]) -> Any:
    from context_diffusion.pipeline import make_engine

    return make_engine(job, broken)


def _shards_with_failures(output: Output) -> set[int]:
    return {shard for shard, part in output.read_parts(["status"]) if "failed" in part["status"].to_pylist()}


def _check_failures(job: GenerateJob, plan: Plan, counts: Counts) -> None:
    allowed = job.failures_allowed(plan.rows)
    if counts.failed > allowed:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(counts.codes.items())) or "see data/"
        raise TooManyFailuresError(
            f"{counts.failed} rows failed, max_failed allows {allowed} of {plan.rows} ({codes}); "
            "raise max_failed, or mend the inputs and run with --retry-failed"
        )


def _finish(
    job: GenerateJob, output: Output, before: Counts, counts: Counts, seconds: float, occupancy: float | None
) -> dict[str, Any]:
    """summary.json, report.html, checksums.parquet, and _SUCCESS last of all; a finished OUTPUT is left as it is."""
    finished = output.storage.exists(output.success)
    made = counts.images - before.images
    summary = {
        "output": output.root,
        **asdict(counts),
        "skipped": before.rows,
        "seconds": round(seconds, 2),
        "images_per_second": round(made / seconds, 3),
        "occupancy": occupancy,
        "exit": EXIT_ROWS_FAILED if counts.failed else EXIT_OK,
    }
    if not finished:
        output.storage.replace(output.summary, json.dumps(summary, indent=2).encode())
        write_report(output, summary)
        close(output)
    return summary
