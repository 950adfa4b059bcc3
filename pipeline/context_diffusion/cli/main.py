"""The command line. Nothing here imports torch or Ray before a command needs it.

Logs and progress go to stderr; the last line of stdout is one JSON object; exit codes describe OUTPUT (core/errors.py).
"""

from __future__ import annotations

import importlib.metadata
import os
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
    RetryFailed,
    Sets,
    errors,
    load_all,
    load_generating,
    print_summary,
    tell_error,
)
from context_diffusion.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_UNEXPECTED,
    REMEDIES,
    ContextDiffusionError,
    ErrorCode,
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

ABOUT = """Makes images that keep the layout of a query, wear the style of context images and follow a prompt; in batches.

Logs and progress go to stderr; the last line of stdout is one JSON object. Exit codes: 0 every row has its image, 3 some
rows failed, 2 the job is wrong, 4 too many rows failed, 75, 143, 130 and 1: stopped or broken off, run it again.
"""

FINISHED = (EXIT_OK, EXIT_ROWS_FAILED)
FAILURES_TOLD = 3

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=ABOUT,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("context-diffusion"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="the version, and nothing else")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The process: a command and its exit code. Ends at once: pyarrow's and Ray's threads may abort a process that
    waits for its modules' end (signal 6, 3 of 25 short runs here), and the code would be lost."""
    open_standard_streams()
    code = _run()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _run() -> int:
    """Runs a command; errors that are meant become one message and their exit code."""
    try:
        return int(app(standalone_mode=False) or EXIT_OK)  # typer.Exit comes back as its code
    except (ContextDiffusionError, RayJobsError) as error:
        tell_error(str(error))
        print_summary({"exit": error.exit_code, "error": str(error)})
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong option or argument
            tell_error(error.format_message() if hasattr(error, "format_message") else str(error))
            return JobError.exit_code
        if LOG.format == LogFormat.JSON:
            tell_error("".join(traceback.format_exception(error)))
        else:
            errors.print_exception()
        return EXIT_UNEXPECTED


@app.command()
def run(
    job: JobFile,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; default: RAY_ADDRESS, else one started here")] = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Runs a job, or what is missing of it; of a file with several one after another, as long as they finish.

    Example: context-diffusion run jobs/demo.yaml --set settings.num_inference_steps=30
    """
    LOG.format = log_format
    jobs, summaries = load_all(job, sets), list[dict[str, Any]]()
    options = {"address": address, "accept_change": accept_change, "retry_failed": retry_failed, "extend": extend}
    for number, one in enumerate(jobs, 1):
        LOG.job = _output_of(one)
        if len(jobs) > 1:
            LOG.tell("job", f"job {number} of {len(jobs)}: {_named(one)}", number=number, of=len(jobs))
        summaries.append(_run_job(one, options, grace, log_format))
        if isinstance(one, GenerateJob) and summaries[-1].get("failed"):
            _tell_failures(one, job, summaries[-1])
        if "error" in summaries[-1]:
            tell_error(summaries[-1]["error"])
        else:
            LOG.tell("finished", **summaries[-1])
        if summaries[-1]["exit"] not in FINISHED:
            break
    code = summaries[-1]["exit"]
    if code in FINISHED:
        code = max(summary["exit"] for summary in summaries)
    print_summary({**summaries[-1], **({"jobs": summaries} if len(jobs) > 1 else {}), "exit": code})
    raise typer.Exit(code)


def _named(job: StrictModel) -> str:
    return "{kind}, {output}".format(**job.model_dump(include={"kind", "output"}))


def _run_job(job: StrictModel, options: dict[str, Any], grace: float, log_format: LogFormat) -> dict[str, Any]:
    """-> the summary, `exit` in it."""
    if isinstance(job, GenerateJob):
        from context_diffusion.cluster.supervisor import supervise

        return supervise(job, options, grace, log_format)
    try:
        return _run_other(job, options["address"])
    except Exception as error:
        return {**job.model_dump(include={"output"}), **classify(error)}


def _tell_failures(job: GenerateJob, file: str, summary: dict[str, Any]) -> None:
    """The first reasons why rows failed, and the next command."""
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.storage.filesystem import Storage

    output = Output(normal(job.output), Storage(job.storage_options, deadline_s=5))
    try:
        failures = output.failures(FAILURES_TOLD)
        report = output.report if summary["exit"] in FINISHED else None
    except (OSError, ContextDiffusionError):  # the store is away, which the summary says
        return
    lines = [f"{summary['failed']} of {summary['rows']} rows failed, such as"]
    lines += [f"  {one_line(row['id'], 100)}: {row['error_code']}: {one_line(row['error_message'], 300)}" for row in failures]
    lines += [f"all of them: {report}"] if report else []
    lines += [f"correct what they name, then: context-diffusion run {file} --retry-failed"]
    LOG.tell("rows_failed", "\n".join(lines), "warning", failed=summary["failed"], first=failures, report=report)


def _output_of(job: StrictModel) -> str:
    from context_diffusion.core.uris import normal

    return normal(job.model_dump(include={"output"})["output"])


def _run_other(job: StrictModel, address: str | None) -> dict[str, Any]:
    """The kinds that need no supervisor. -> the summary, `exit` in it."""
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


@app.command()
def validate(
    job: JobFile,
    sets: Sets = None,
    sample: Annotated[int, typer.Option(min=0, help="rows whose pictures are loaded")] = 8,
    pictures: Annotated[str | None, typer.Option(metavar="FILE.png", help="makes their images, and tells the time")] = None,
) -> None:
    """Checks job, model, manifest, storage and OUTPUT; loads the pictures of some rows. Starts no Ray and leaves OUTPUT as it is.
    Ends with 3 where sampled rows would fail (4: more than max_failed allows), with 2 where `run` would. Of a file with several
    jobs each that generates.

    Example: context-diffusion validate jobs/demo.yaml --sample 4 --pictures sample.png
    """
    from context_diffusion.generation.estimate import estimate_lines
    from context_diffusion.generation.local_model import png_uri
    from context_diffusion.generation.validate import validate_job

    sheet = png_uri("--pictures", pictures) if pictures else None
    jobs, told = load_generating(job, sets), []
    if sheet and len(jobs) > 1:
        raise JobError(f"{job} has {len(jobs)} jobs that generate: --pictures takes a file of one")
    for one in jobs:
        if len(jobs) > 1:
            errors.print(_named(one))
        told.append(found := validate_job(one, sample, sheet))
        for line in found["warnings"]:
            errors.print(f"warning: {line}")
        for problem in found["problems"]:
            errors.print(f"row {problem['id']}: {problem['error_code']}: {problem['error_message']}")
        for code in dict.fromkeys(problem["error_code"] for problem in found["problems"]):
            errors.print(f"{code}: {REMEDIES[ErrorCode(code)]}")
        errors.print(f"{found['rows']} rows in {found['shards']} shards; {len(found['problems'])} of those looked at would fail")
        for line in estimate_lines(found) if sheet else []:
            errors.print(line)
    code = max(found["exit"] for found in told)
    print_summary({**told[-1], **({"jobs": told} if len(jobs) > 1 else {}), "exit": code})
    raise typer.Exit(code)


for command in (
    *(cluster_commands.warm, cluster_commands.submit, cluster_commands.stop, cluster_commands.status),
    *(output_commands.report, output_commands.view, output_commands.verify, output_commands.compact),
    *(setup_commands.manifest, setup_commands.doctor, image_commands.preview, image_commands.reproduce),
):
    app.command()(command)


if __name__ == "__main__":
    main()
