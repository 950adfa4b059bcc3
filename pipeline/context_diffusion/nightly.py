"""A night's job step by step, as each orchestrator calls it: wait for the manifest, submit, follow, check.

The standard library, PyYAML and ray_jobs.py alone: `pip install --no-deps context-diffusion`, or both files beside the
DAG's.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from context_diffusion.ray_jobs import RayJobs, RayJobsError, last_line, submit

Job = dict[str, Any]
FINISHED = (0, 3)
WRONG = (2, 4)  # the job, or its inputs: another try would end alike


class WrongJobError(Exception):
    """No retry mends it."""


class BrokenOffError(Exception):
    """A retry resumes it."""


class NotReadyError(Exception):
    """The manifest is not there yet."""


def of_day(job: Job, day: str) -> Job:
    """The job file's values with {day} filled in, in all its strings."""
    filled: Job = json.loads(json.dumps(job).replace("{day}", day))
    return filled


def job_of(day: str, default: Path) -> Job:
    """The job file that CONTEXT_DIFFUSION_JOB names, of that day."""
    import yaml

    job: Job = yaml.safe_load(Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or default).read_text())
    return of_day(job, day)


def check_ready(jobs: RayJobs, job: Job, sample: int = 8) -> dict[str, Any]:
    """Validates the job on the cluster: its manifest, and the pictures of some rows. -> what `validate` says.

    Raises NotReadyError while there is no manifest, WrongJobError."""
    name = f"validate-{time.time_ns()}"
    command = ["python", "-m", "context_diffusion", "validate", "/dev/stdin", "--sample", str(sample)]
    jobs.submit(name, f"printf %s {shlex.quote(json.dumps(job, ensure_ascii=False))} | {shlex.join(command)}")
    told: list[str] = []
    code = jobs.follow(name, told.append, every_s=1)
    if code == 0:
        return last_line("\n".join(told))
    error = str(last_line("\n".join(told)).get("error") or "\n".join(told[-5:]))
    if "there is no such manifest" in error:
        raise NotReadyError(error)
    raise (WrongJobError if code in WRONG else BrokenOffError)(error)


def run(jobs: RayJobs, job: Job, tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Submits, or joins what runs, and follows it to its end; whoever interrupts this stops the Ray job too. -> the
    summary. Raises WrongJobError, BrokenOffError."""
    submission = submit(jobs, job)
    tell(f"{submission.id} at {jobs.address}")
    try:
        code = jobs.follow(submission.id, tell)
    except BaseException as error:
        if not isinstance(error, RayJobsError):  # the orchestrator's cancellation: the cluster is paid for
            jobs.stop(submission.id)
        raise
    summary = last_line(jobs.logs(submission.id))
    if code in FINISHED:
        return summary
    told = f"{submission.id} ended with {code}: {summary.get('error', 'see its log')}"
    raise WrongJobError(told) if code in WRONG else BrokenOffError(told)


def check(summary: dict[str, Any], max_failed_share: float = 0.01) -> str:
    """-> OUTPUT's path. Raises WrongJobError where more rows failed than that."""
    share = summary["failed"] / max(summary["rows"], 1)
    if share > max_failed_share:
        told = f"{summary['failed']} of {summary['rows']} rows failed, {share:.1%}; allowed are {max_failed_share:.1%}"
        raise WrongJobError(f"{summary['output']}: {told}: see its report.html")
    return str(summary["output"])
