"""The command line. Commands import torch and Ray only when they need them.

Logs and progress go to stderr; the last line of stdout is one JSON object; exit codes describe OUTPUT
(core/errors.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from context_diffusion.cli import cluster_commands, image_commands, output_commands, setup_commands
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
    stderr,
    summary_of_all,
    title_of,
    unknown_words_line,
)
from context_diffusion.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_JOB,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_UNEXPECTED,
    ContextDiffusionError,
    JobError,
    classify,
    one_line,
)
from context_diffusion.core.event_log import LOG, LogFormat, open_standard_streams
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel
from context_diffusion.ray_jobs import RayJobsError

if TYPE_CHECKING:
    from context_diffusion.core.training_job import TrainingJob
    from context_diffusion.outputs.output_folder import Output

ABOUT = """Generates images that keep the layout of a query image, take the style of context images
and follow a prompt, in batches on Ray.

Logs and progress go to stderr; the last line of stdout is one JSON object.

Exit codes: 0 every row has its image, 3 some rows failed,
2 the job is invalid, 4 too many rows failed, 75 an external error,
130 and 143 stopped, 1 an unexpected error.
After 75, 130, 143 and 1 rerun the same command to resume.
"""

FINISHED = (EXIT_OK, EXIT_ROWS_FAILED)
FIRST_FAILURES = 3  # that the log names
FIRST_WORDS = 10

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=ABOUT,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print(importlib.metadata.version("context-diffusion"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command of the process's arguments and end the process with its exit code.

    Ends at once, since threads of pyarrow and Ray may abort a process that waits for the end of its modules
    (signal 6, 3 of 25 short runs here), and the exit code would be lost."""
    open_standard_streams()
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader is gone
            stream.flush()
    os._exit(code)


def _run() -> int:
    """Run a command. Errors that are raised on purpose become one message and their exit code."""
    try:
        return int(app(standalone_mode=False) or EXIT_OK)  # typer.Exit comes back as its code
    except (ContextDiffusionError, RayJobsError) as error:
        print_error(str(error))
        print_summary({"exit": error.exit_code, "error": str(error)})
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong option or argument
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            print_error(text.replace("Value error, ", ""))
            return JobError.exit_code
        if LOG.format == LogFormat.JSON:
            print_error("".join(traceback.format_exception(error)))
        else:
            stderr.print_exception()
        return EXIT_UNEXPECTED


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
    lines += [f"fix the causes, then run: context-diffusion run {file} --retry-failed"]
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


# In the order of work, which is the order of the help.
for command in (
    *(setup_commands.doctor, setup_commands.init, setup_commands.manifest, setup_commands.validate),
    *(image_commands.preview, run),
    *(cluster_commands.submit, cluster_commands.status, cluster_commands.stop, cluster_commands.warm),
    *(output_commands.report, output_commands.view, output_commands.verify, output_commands.compact),
    image_commands.reproduce,
):
    app.command()(command)


if __name__ == "__main__":
    main()
