"""What the commands share: where they speak, how they read a job, and the options that several of them take."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from context_diffusion.config import GenerateJob
from context_diffusion.errors import JobError
from context_diffusion.strict import StrictModel

errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="a job file, YAML or JSON")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="key=value", help="overrides a key: settings.seed=7")]


def print_summary(summary: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(summary), flush=True)


def load_any(job: str, sets: list[str] | None) -> StrictModel:
    from context_diffusion.jobfile import load_job

    return load_job(job, sets)


def load_generate(job: str, sets: list[str] | None) -> GenerateJob:
    loaded = load_any(job, sets)
    if not isinstance(loaded, GenerateJob):
        raise JobError(f"{job}: this command takes a job of kind generate")
    return loaded
