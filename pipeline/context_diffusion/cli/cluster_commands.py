"""The commands for a cluster: `submit`, `status`, `stop`, `warm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from context_diffusion.cli.options import (
    AcceptChange,
    Address,
    Extend,
    Grace,
    JobFile,
    LogFormats,
    RayAddress,
    RetryFailed,
    Sets,
    load_all,
    load_generating,
    print_error,
    print_summary,
    stderr,
)
from context_diffusion.core.errors import EXIT_OK, JobError
from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.ray_jobs import RayJobs, Submission, known_address

Wait = Annotated[bool, typer.Option("--wait", help="follow the job's log and end with its exit code")]
Wheel = Annotated[
    Path | None, typer.Option(metavar="FILE", help="ship this wheel of the package, if the cluster lacks it")
]
Variables = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="environment variable of the job's processes")
]
SubmissionId = Annotated[str, typer.Argument(metavar="SUBMISSION", help="the name that `submit` printed")]
OutputOrSubmission = Annotated[
    str,
    typer.Argument(metavar="OUTPUT|SUBMISSION", help="an output folder, or the name that `submit` printed"),
]


def _cluster(address: str | None) -> RayJobs:
    """Return the cluster of the address or the environment, which reports long waits."""
    return RayJobs.known(address, lambda line: LOG.emit("waiting", line, message=line))


def submit(
    job: JobFile,
    sets: Sets = None,
    address: Address = None,
    wait: Wait = False,
    wheel: Wheel = None,
    env: Variables = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Run a job on a cluster through Ray's Jobs API.

    A job that is still running is followed; one that has ended is resumed.

    Example: context-diffusion submit jobs/demo.yaml --address http://127.0.0.1:8265 --wait
    """
    from context_diffusion import ray_jobs
    from context_diffusion.cluster.submit import local_paths, runtime_env
    from context_diffusion.core.job_file import absolute

    LOG.format = log_format
    values = [absolute(loaded) for loaded in load_all(job, sets)]
    cluster = _cluster(address)
    options = {"--retry-failed": retry_failed, "--extend": extend, "--accept-change": accept_change}
    flags = tuple(flag for flag, is_set in options.items() if is_set)
    environment = runtime_env(cluster, wheel, _variables(env or []))
    submission = ray_jobs.submit(cluster, values, flags, environment, grace, log_format)
    LOG.job = submission.output
    for path in dict.fromkeys(path for listed in values for path in local_paths(listed, cluster.address)):
        LOG.warn(f"{path} is a path of this machine: every node of {cluster.address} must have it")
    _report_submission(submission)
    code = cluster.follow(submission.id, LOG.relay) if wait else EXIT_OK
    fields = {"submission_id": submission.id, "attached": submission.attached, "output": submission.output}
    print_summary({**fields, "exit": code})
    raise typer.Exit(code)


def _report_submission(submission: Submission) -> None:
    state = "is already running" if submission.attached else "is submitted"
    text = f"{submission.id} {state}; to see its progress: context-diffusion status {submission.id}"
    LOG.emit("submitted", text, id=submission.id, attached=submission.attached)


def _variables(pairs: list[str]) -> dict[str, str]:
    """Parse KEY=VALUE pairs. Raises JobError."""
    variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(variables) < len(pairs):
        raise JobError(f"--env {' '.join(pairs)}: expected KEY=VALUE, each KEY once")
    return variables


def status(name: OutputOrSubmission, address: Address = None) -> None:
    """Show the progress of a job.

    Counts the parts in its OUTPUT, so it works without its cluster.

    Example: context-diffusion status build/demo
    """
    from context_diffusion.cluster.submit import submission_of
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.outputs.status import progress_of
    from context_diffusion.storage.filesystem import Storage

    output = Output(normal(name), Storage())
    submission = None
    if not output.storage.exists(output.plan):
        submission = submission_of(name, _cluster(address) if address or known_address() else None)
        output = Output(submission["output"], Storage())
    progress = progress_of(output)
    if submission:
        message = f": {submission['message']}" if submission["message"] else ""
        stderr.print(f"{name}: {submission['status']}{message}")
    for line in progress.lines:
        stderr.print(line)
    print_summary({**({"submission": submission} if submission else {}), **progress.values, "exit": EXIT_OK})


def stop(submission: SubmissionId, address: Address = None) -> None:
    """Stop a submitted job.

    The shards in progress are finished. Submit the job again to resume.

    Example: context-diffusion stop demo-0a1b2c3d-4e5f60-1
    """
    stopped = _cluster(address).stop(submission)
    stderr.print(f"{submission}: {'stop requested' if stopped else 'is not running'}")
    print_summary({"submission_id": submission, "stopped": stopped, "exit": EXIT_OK})


def warm(job: JobFile, sets: Sets = None, address: RayAddress = None) -> None:
    """Download a job's weights and load them once on each node that may have an engine.

    Example: context-diffusion warm jobs/generate_sd15.yaml
    """
    from context_diffusion.cluster.warm_weights import warm as warm_nodes

    jobs_by_model = {str(loaded.model): loaded for loaded in load_generating(job, sets)}
    summary = warm_nodes(list(jobs_by_model.values()), address)
    for node in summary["nodes"]:
        stderr.print(f"{node['address']}: {node['model']} is loaded ({node['seconds']} s)")
    if "error" in summary:
        print_error(summary["error"])
    print_summary(summary)
    raise typer.Exit(summary["exit"])
