"""What the commands share: the console, how they read a job, and options that several of them take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any

import typer

from context_diffusion.core.errors import JobError
from context_diffusion.core.event_log import LOG, LogFormat, console
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import StrictModel

stderr = console()

JobFile = Annotated[
    str, typer.Argument(metavar="JOB", help="a job file, YAML or JSON, of one or several jobs")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="key=value",
        help="override a key, such as settings.seed=7, in each job of the file that has it",
    ),
]
Folder = Annotated[str, typer.Argument(metavar="OUTPUT", help="the output folder of a job, a path or URL")]
Address = Annotated[
    str | None,
    typer.Option(
        help="address of the cluster's dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS"
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="address of a Ray cluster; default: RAY_ADDRESS, else Ray starts on this machine"),
]
RetryFailed = Annotated[bool, typer.Option(help="regenerate the failed rows")]
Extend = Annotated[
    bool, typer.Option(help="add rows that are new at the end of the manifest, or in new files")
]
AcceptChange = Annotated[bool, typer.Option(help="continue with other versions of torch or diffusers")]
Grace = Annotated[
    float, typer.Option(min=0, help="seconds after SIGTERM for the shards in progress to finish")
]
LogFormats = Annotated[
    LogFormat, typer.Option(help="format of stderr: lines of text, or one JSON object per line")
]


def print_summary(summary: dict[str, Any]) -> None:
    """Print the last line of stdout. If stdout is closed, the exit code still gives the outcome."""
    with suppress(OSError):
        print(json.dumps(summary), flush=True)


def print_error(error: str) -> None:
    """Print an error to stderr."""
    LOG.emit("error", f"error: {error}", "error", error=error)


def summary_of_all(summaries: list[dict[str, Any]], code: int, jobs: int) -> dict[str, Any]:
    """Return the summary of a file of `jobs` jobs: that of the last one that ran, with all of them under
    `jobs` if the file has several."""
    return {**summaries[-1], **({"jobs": summaries} if jobs > 1 else {}), "exit": code}


def title_of(job: StrictModel) -> str:
    """Return a job's kind and OUTPUT."""
    return "{kind}, {output}".format(**job.model_dump(include={"kind", "output"}))


def unknown_words_line(rows: int, words: Iterable[str]) -> str:
    """Write how many rows have words in the prompt that have no effect, and some of these."""
    have = "row has" if rows == 1 else "rows have"
    return f"{rows} {have} words in the prompt that the model does not know, such as: {', '.join(words)}"


def load_all(job: str, sets: list[str] | None) -> list[StrictModel]:
    """Read the jobs of a file."""
    from context_diffusion.core.job_file import load_jobs

    return load_jobs(job, sets)


def load_generating(job: str, sets: list[str] | None) -> list[GenerateJob]:
    """Read the generate jobs of a file. Raises JobError if it has none."""
    jobs = [loaded for loaded in load_all(job, sets) if isinstance(loaded, GenerateJob)]
    if not jobs:
        raise JobError(f"{job}: this command takes a job of kind generate")
    return jobs
