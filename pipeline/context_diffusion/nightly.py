"""A night's job step by step, as each orchestrator calls it: wait for the manifest, submit, follow, check.

    python -m context_diffusion.nightly ready jobs/nightly.yaml --day 2026-11-27     # 75 while there is no manifest
    python -m context_diffusion.nightly run jobs/nightly.yaml --day 2026-11-27 --max-failed-share 0.01

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster. SIGTERM stops the Ray job; the same command resumes it.
The standard library, PyYAML and ray_jobs.py alone: `pip install --no-deps context-diffusion`, or both files beside the
DAG's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from context_diffusion.ray_jobs import (
    EXIT_LOST,
    EXIT_STOPPED,
    EXIT_WRONG,
    RayJobs,
    RayJobsError,
    entrypoint_of,
    last_line,
    submit,
)

Job = dict[str, Any] | list[dict[str, Any]]  # a job file's values, or those of its several jobs
FINISHED = (0, 3)
WRONG = (2, 4)  # the job, or its inputs: another try would end alike


class WrongJobError(Exception):
    """No retry mends it."""

    exit_code = EXIT_WRONG


class BrokenOffError(Exception):
    """A retry resumes it."""

    exit_code = EXIT_LOST


class NotReadyError(BrokenOffError):
    """The manifest is not there yet."""


def interrupted(*_: object) -> NoReturn:
    """A signal's handler, where the orchestrator's own does not reach `run`."""
    raise SystemExit(EXIT_STOPPED)


def of_day(job: Job, day: str) -> Job:
    """The job file's values with {day} filled in, in all its strings."""
    filled: Job = json.loads(json.dumps(job).replace("{day}", day))
    return filled


def job_of(day: str, default: Path) -> Job:
    """The job file that CONTEXT_DIFFUSION_JOB names, of that day. Raises WrongJobError."""
    return read_job(Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or default), day)


def read_job(path: Path, day: str) -> Job:
    """Raises WrongJobError where it cannot be read."""
    import yaml

    try:
        jobs: list[Any] = [one for one in yaml.safe_load_all(path.read_text()) if one is not None]
    except (OSError, yaml.YAMLError) as error:
        raise WrongJobError(f"{path} is no job file that can be read: {error}") from None
    return of_day(jobs[0] if len(jobs) == 1 else jobs, day)


def check_ready(jobs: RayJobs, job: Job, sample: int = 8) -> dict[str, Any]:
    """Validates the job on the cluster: its manifest, and the pictures of some rows. -> what `validate` says.

    Raises NotReadyError while there is no manifest, WrongJobError."""
    name = f"validate-{time.time_ns()}"
    jobs.submit(name, entrypoint_of(["validate", "/dev/stdin", "--sample", str(sample)], job))
    told: list[str] = []
    code = jobs.follow(name, told.append, every_s=1)
    summary = last_line("\n".join(told))
    if code in FINISHED:  # where some rows would fail the job's own limit decides
        return summary
    failed = [str(problem.get("error_message")) for problem in summary.get("problems", [])]
    if failed:
        raise WrongJobError(f"{len(failed)} of {summary.get('sampled')} sampled rows would fail, such as: {failed[0]}")
    error = str(summary.get("error") or "\n".join(told[-5:]))
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


def main(words: list[str]) -> int:
    """The command. -> its exit code: 2 no retry mends it, 75 a retry resumes it."""
    parser = argparse.ArgumentParser("python -m context_diffusion.nightly", description=str(__doc__).partition("\n")[0])
    parser.add_argument("step", choices=("ready", "run"))
    parser.add_argument("job", type=Path, metavar="JOB")
    parser.add_argument("--day", default=datetime.now(UTC).date().isoformat(), help="what {day} stands for; default: today, UTC")
    parser.add_argument(
        "--max-failed-share", type=float, default=0.01, help="more failed rows are an error; default: %(default)s"
    )
    told = parser.parse_args(words)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        job, jobs = read_job(told.job, told.day), RayJobs.known()
        if told.step == "ready":
            print(json.dumps(check_ready(jobs, job)))
        else:
            print(check(run(jobs, job, lambda line: print(line, file=sys.stderr)), told.max_failed_share))
    except (WrongJobError, BrokenOffError, RayJobsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
