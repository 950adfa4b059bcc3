"""The command that runs jobs, and what it reports at their end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import typer

from context_diffusion.cli.options import (
    AcceptChange,
    Extend,
    Grace,
    JobFile,
    LogFormats,
    RayAddress,
    RetryFailed,
    Sets,
    load_all,
    print_error,
    print_summary,
    summary_of_all,
    title_of,
    unknown_words_line,
)
from context_diffusion.core.errors import (
    EXIT_JOB,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    ContextDiffusionError,
    classify,
    one_line,
)
from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel

if TYPE_CHECKING:
    from context_diffusion.core.training_job import TrainingJob
    from context_diffusion.outputs.output_folder import Output

FINISHED = (EXIT_OK, EXIT_ROWS_FAILED)
FIRST_FAILURES = 3  # that the log names
FIRST_WORDS = 10


def run(
    job: JobFile,
    sets: Sets = None,
    address: RayAddress = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Run a job, or the unfinished part of it.

    The jobs of a file run one after another, until one does not finish.

    Example: context-diffusion run jobs/demo.yaml --set settings.num_inference_steps=30
    """
    LOG.format = log_format
    jobs = load_all(job, sets)
    options = {
        "address": address,
        "accept_change": accept_change,
        "retry_failed": retry_failed,
        "extend": extend,
        "job_file": job,
    }
    summaries: list[dict[str, Any]] = []
    for number, loaded in enumerate(jobs, 1):
        LOG.job = _output_of(loaded)
        if len(jobs) > 1:
            LOG.emit("job", f"job {number} of {len(jobs)}: {title_of(loaded)}", number=number, of=len(jobs))
        summary = _run_job(loaded, options, grace, log_format)
        summaries.append(summary)
        _report_end(loaded, job, summary)
        if summary["exit"] not in FINISHED:
            break
    code = summaries[-1]["exit"]
    if code in FINISHED:
        code = max(summary["exit"] for summary in summaries)
    print_summary(summary_of_all(summaries, code, len(jobs)))
    raise typer.Exit(code)


def _run_job(
    job: StrictModel, options: dict[str, Any], grace: float, log_format: LogFormat
) -> dict[str, Any]:
    """Run a job of any kind. Returns its summary, with `exit`."""
    if isinstance(job, GenerateJob):
        from context_diffusion.cluster.supervisor import supervise

        return supervise(job, options, grace, log_format)
    try:
        return _run_other(job, options["address"])
    except Exception as error:
        return {**job.model_dump(include={"output"}), **classify(error)}


def _report_end(job: StrictModel, file: str, summary: dict[str, Any]) -> None:
    """Write a job's failed rows, and its error or its end, to the log."""
    if isinstance(job, GenerateJob) and summary.get("exit") != EXIT_JOB:
        if summary.get("failed"):
            _report_failures(job, file, summary)
        if summary.get("unknown_words"):
            _report_unknown_words(job, summary["unknown_words"])
    if "error" in summary:
        print_error(summary["error"])
    else:
        lines = _result_lines(job) if isinstance(job, GenerateJob) else []
        LOG.emit("finished", "\n".join(lines) or None, **summary)


def _result_lines(job: GenerateJob) -> list[str]:
    """Return where a finished job's images and report are, and the command that shows all rows."""
    from importlib.util import find_spec

    output = job.output.rstrip("/")
    folder = {"webdataset": "webdataset", "parquet": "data"}.get(job.images_in, "images")
    has_viewer = find_spec("duckdb") and find_spec("starlette")
    install = "" if has_viewer else "  (needs: pip install 'context-diffusion[view]')"
    return [
        f"images: {output}/{folder}" + (", column image" if folder == "data" else ""),
        f"report: {output}/report.html",
        f"view:   context-diffusion view {shlex.quote(output)}{install}",
    ]


def _report_failures(job: GenerateJob, file: str, summary: dict[str, Any]) -> None:
    """Write the first failed rows with their reasons, and the next command, to the log."""
    output = _opened(job)
    try:
        failures = output.failures(FIRST_FAILURES)
        report = output.report if summary["exit"] in FINISHED else None
    except (OSError, ContextDiffusionError):  # the store is away; the summary has the error
        return
    lines = [f"{summary['failed']} of {summary['rows']} rows failed, for example:"]
    for row in failures:
        message = one_line(row["error_message"], 300)
        lines.append(f"  {one_line(row['id'], 100)}: {row['error_code']}: {message}")
    lines += [f"fix the causes, then run: context-diffusion run {shlex.quote(file)} --retry-failed"]
    text = "\n".join(lines)
    LOG.emit("rows_failed", text, "warning", failed=summary["failed"], first=failures, report=report)


def _report_unknown_words(job: GenerateJob, rows: int) -> None:
    """Write how many rows have words in the prompt that had no effect, and some of these, to the log."""
    try:
        words = _opened(job).unknown_words(FIRST_WORDS)
    except (OSError, ContextDiffusionError):  # the store is away
        return
    LOG.emit("unknown_words", unknown_words_line(rows, words), "warning", rows=rows, words=words)


def _opened(job: GenerateJob) -> Output:
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.storage.filesystem import Storage

    return Output(normal(job.output), Storage(job.storage_options, deadline_s=5))


def _output_of(job: StrictModel) -> str:
    from context_diffusion.core.uris import normal

    return normal(job.model_dump(include={"output"})["output"])


def _run_other(job: StrictModel, address: str | None) -> dict[str, Any]:
    """Run a job of a kind that needs no supervisor. Returns its summary, with `exit`."""
    from context_diffusion.core.evaluate_job import EvaluateJob
    from context_diffusion.core.training_job import TrainingJob

    if isinstance(job, EvaluateJob):
        from context_diffusion.evaluation.run import run_evaluate

        return run_evaluate(job)
    assert isinstance(job, TrainingJob)
    return {"exit": EXIT_OK, **_train(job, address)}


def _train(job: TrainingJob, address: str | None) -> dict[str, Any]:
    if job.workers == 1 and not address:
        from context_diffusion.training.run import run_training

        return run_training(job)
    from context_diffusion.cluster.train_workers import train_on_ray

    return train_on_ray(job, address)
