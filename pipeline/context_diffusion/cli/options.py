"""What the commands share: where they speak, how they read a job, and the options that several of them take."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

import typer

from context_diffusion.core.errors import JobError
from context_diffusion.core.event_log import LOG, LogFormat, console
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel

errors = console()

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="a file of one job or several, YAML or JSON")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key=value", help="overrides a key: settings.seed=7; of several jobs in each that has it"),
]
Folder = Annotated[str, typer.Argument(metavar="OUTPUT", help="the output folder of a job")]
Address = Annotated[str | None, typer.Option(help="of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS")]
RetryFailed = Annotated[bool, typer.Option(help="make the rows that failed anew")]
Extend = Annotated[bool, typer.Option(help="the manifest has grown at its end: make what is new")]
AcceptChange = Annotated[bool, typer.Option(help="go on with other versions of torch or diffusers")]
Grace = Annotated[float, typer.Option(min=0, help="seconds after SIGTERM in which the shards that were begun may end")]
LogFormats = Annotated[LogFormat, typer.Option(help="of stderr: lines for people, or a JSON object a line")]


def print_summary(summary: dict[str, Any]) -> None:
    """The last line of stdout. Where nobody reads it the exit code still says how it ended."""
    with suppress(OSError):
        print(json.dumps(summary), flush=True)


def tell_error(error: str) -> None:
    LOG.tell("error", f"error: {error}", "error", error=error)


def load_all(job: str, sets: list[str] | None) -> list[StrictModel]:
    """The file's jobs."""
    from context_diffusion.core.job_file import load_jobs

    return load_jobs(job, sets)


def load_generating(job: str, sets: list[str] | None) -> list[GenerateJob]:
    """Those that generate, of which there must be one."""
    jobs = [one for one in load_all(job, sets) if isinstance(one, GenerateJob)]
    if not jobs:
        raise JobError(f"{job}: this command takes a job of kind generate")
    return jobs
