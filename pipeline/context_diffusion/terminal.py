"""What the commands share: where they speak, how they read a job, and the options that several of them take."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from context_diffusion.config import GenerateJob
from context_diffusion.errors import JobError
from context_diffusion.log import LOG
from context_diffusion.strict import StrictModel

errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="a file of one job or several, YAML or JSON")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key=value", help="overrides a key: settings.seed=7; 2.seed=7 in the second job"),
]


def print_summary(summary: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(summary), flush=True)


def tell_error(error: str) -> None:
    LOG.tell("error", f"error: {error}", "error", error=error)


def load_all(job: str, sets: list[str] | None) -> list[StrictModel]:
    """The file's jobs."""
    from context_diffusion.jobfile import load_jobs

    return load_jobs(job, sets)


def load_generating(job: str, sets: list[str] | None) -> list[GenerateJob]:
    """Those that generate, of which there must be one."""
    jobs = [one for one in load_all(job, sets) if isinstance(one, GenerateJob)]
    if not jobs:
        raise JobError(f"{job}: this command takes a job of kind generate")
    return jobs
