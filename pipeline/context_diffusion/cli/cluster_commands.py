"""Commands that speak to a cluster: `warm`, `submit`, `stop`, `status`. cli/main.py puts them on the command line."""

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
    RetryFailed,
    Sets,
    errors,
    load_all,
    load_generating,
    print_summary,
    tell_error,
)
from context_diffusion.core.errors import EXIT_OK, JobError
from context_diffusion.core.event_log import LOG, LogFormat
from context_diffusion.ray_jobs import RayJobs, known_address


def _cluster(address: str | None) -> RayJobs:
    """The cluster that is meant; whoever waits for it is told."""
    return RayJobs.known(address, lambda line: LOG.tell("waiting", line, message=line))


def warm(
    job: JobFile,
    sets: Sets = None,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; default: RAY_ADDRESS, else this machine")] = None,
) -> None:
    """Downloads a job's weights on each node that may have an engine, once a node or shared cache, and loads them once.

    Example: context-diffusion warm jobs/generate_sd15.yaml; on a cluster: ray job submit -- context-diffusion warm JOB
    """
    from context_diffusion.cluster.warm_weights import warm as fill

    told = fill(list({str(one.model): one for one in load_generating(job, sets)}.values()), address)
    for node in told["nodes"]:
        errors.print(f"{node['address']}: {node['model']} is there ({node['seconds']} s)")
    if "error" in told:
        tell_error(told["error"])
    print_summary(told)
    raise typer.Exit(told["exit"])


def submit(
    job: JobFile,
    sets: Sets = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="follows its log and ends with its code")] = False,
    wheel: Annotated[Path | None, typer.Option(metavar="FILE", help="ships the package, where the image lacks it")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="for the job's processes")] = None,
    retry_failed: RetryFailed = False,
    extend: Extend = False,
    accept_change: AcceptChange = False,
    grace: Grace = 20.0,
    log_format: LogFormats = LogFormat.TEXT,
) -> None:
    """Runs a job on a cluster, through Ray's Jobs API. Submitted again while it runs, it is joined; later, resumed.

    Example: context-diffusion submit jobs/demo.yaml --address http://127.0.0.1:8265 --wait
    """
    from context_diffusion import ray_jobs
    from context_diffusion.cluster.submit import local_paths, runtime_env
    from context_diffusion.core.job_file import absolute

    LOG.format = log_format
    values, jobs = [absolute(one) for one in load_all(job, sets)], _cluster(address)
    chosen = {"--retry-failed": retry_failed, "--extend": extend, "--accept-change": accept_change}
    variables = dict(pair.split("=", 1) for pair in env or [] if "=" in pair)
    if len(variables) < len(env or []):
        raise JobError(f"--env {' '.join(env or [])}: write KEY=VALUE, each KEY once")
    flags = tuple(flag for flag, on in chosen.items() if on)
    made = ray_jobs.submit(jobs, values, flags, runtime_env(jobs, wheel, variables), grace, log_format)
    LOG.job = made.output
    for path in dict.fromkeys(path for one in values for path in local_paths(one, jobs.address)):
        message = f"{path} is a path of this machine: every node of {jobs.address} must have it"
        LOG.tell("warning", f"warning: {message}", "warning", message=message)
    text = f"{made.id} {'runs already' if made.attached else 'is submitted'}; context-diffusion status {made.id}"
    LOG.tell("submitted", text, id=made.id, attached=made.attached)
    code = jobs.follow(made.id, LOG.relay) if wait else EXIT_OK
    print_summary({"submission_id": made.id, "attached": made.attached, "output": made.output, "exit": code})
    raise typer.Exit(code)


def stop(submission: Annotated[str, typer.Argument(metavar="SUBMISSION")], address: Address = None) -> None:
    """Stops a submitted job so that it can be resumed. Example: context-diffusion stop demo-0a1b2c3d-4e5f60-1"""
    stopped = _cluster(address).stop(submission)
    errors.print(f"{submission} {'is told to stop' if stopped else 'does not run'}")
    print_summary({"submission_id": submission, "stopped": stopped, "exit": EXIT_OK})


def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT|SUBMISSION", help="an output folder, or what `submit` named")],
    address: Address = None,
) -> None:
    """How far a job is, from the parts of its OUTPUT, whatever became of its run.

    Example: context-diffusion status build/demo
    """
    from context_diffusion.cluster.submit import submission_of
    from context_diffusion.core.uris import normal
    from context_diffusion.outputs.output_folder import Output
    from context_diffusion.outputs.status import progress_of
    from context_diffusion.storage.filesystem import Storage

    opened, job = Output(normal(output), Storage()), None
    if not opened.storage.exists(opened.plan):
        job = submission_of(output, _cluster(address) if address or known_address() else None)
        opened = Output(job["output"], Storage())
    told = progress_of(opened)
    if job:
        errors.print(f"{output}: {job['status']}{': ' + job['message'] if job['message'] else ''}")
    for line in told.lines:
        errors.print(line)
    print_summary({**({"submission": job} if job else {}), **told.values, "exit": EXIT_OK})
