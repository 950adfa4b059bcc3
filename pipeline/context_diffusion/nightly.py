"""A nightly job in steps that every orchestrator calls: wait for the manifest, submit, follow, check.

    python -m context_diffusion.nightly ready jobs/nightly.yaml --day 2026-11-27     # 75 without a manifest
    python -m context_diffusion.nightly run jobs/nightly.yaml --day 2026-11-27 --max-failed-share 0.01

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster. SIGTERM stops the Ray job; the same command
resumes it. Needs only the standard library, PyYAML and ray_jobs.py: `pip install --no-deps
context-diffusion`, or both files next to the DAG."""

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

Job = dict[str, Any] | list[dict[str, Any]]  # the values of a job file of one or several jobs
FINISHED = (0, 3)
WRONG = (2, 4)  # the job or its inputs are wrong: a retry would end with the same code


class WrongJobError(Exception):
    """The job or its inputs are wrong; a retry does not help."""

    exit_code = EXIT_WRONG


class BrokenOffError(Exception):
    """The job was interrupted; a retry resumes it."""

    exit_code = EXIT_LOST


class NotReadyError(BrokenOffError):
    """The manifest does not exist yet."""


def interrupted(*_: object) -> NoReturn:
    """Handle a signal by raising SystemExit, so that `run` stops the Ray job."""
    raise SystemExit(EXIT_STOPPED)


def of_day(job: Job, day: str) -> Job:
    """Return the job file's values with {day} replaced in all strings."""
    job_of_day: Job = json.loads(json.dumps(job).replace("{day}", day))
    return job_of_day


def job_of(day: str, default: Path) -> Job:
    """Read the job file that CONTEXT_DIFFUSION_JOB names, or the default, for a day. Raises WrongJobError."""
    return read_job(Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or default), day)


def read_job(path: Path, day: str) -> Job:
    """Read a job file for a day. Raises WrongJobError."""
    import yaml

    try:
        jobs: list[Any] = [job for job in yaml.safe_load_all(path.read_text()) if job is not None]
    except (OSError, yaml.YAMLError) as error:
        raise WrongJobError(f"{path}: cannot read the job file: {error}") from None
    return of_day(jobs[0] if len(jobs) == 1 else jobs, day)


def check_ready(jobs: RayJobs, job: Job, sample: int = 8) -> dict[str, Any]:
    """Validate the job on the cluster: its manifest and the images of `sample` rows.

    Returns the summary of `validate`. Raises NotReadyError while there is no manifest, WrongJobError,
    BrokenOffError."""
    submission_id = f"validate-{time.time_ns()}"
    jobs.submit(submission_id, entrypoint_of(["validate", "/dev/stdin", "--sample", str(sample)], job))
    lines: list[str] = []
    code = jobs.follow(submission_id, lines.append, every_s=1)
    summary = last_line("\n".join(lines))
    if code in FINISHED:  # if sampled rows fail, the job's max_failed decides
        return summary
    failed = [str(problem.get("error_message")) for problem in summary.get("problems", [])]
    if failed:
        raise WrongJobError(
            f"{len(failed)} of {summary.get('sampled')} sampled rows failed, such as: {failed[0]}"
        )
    error = str(summary.get("error") or "\n".join(lines[-5:]))
    if "there is no such manifest" in error:
        raise NotReadyError(error)
    raise (WrongJobError if code in WRONG else BrokenOffError)(error)


def run(jobs: RayJobs, job: Job, tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Submit the job, or join it if it is running, and follow it to its end. An interruption stops the Ray
    job.

    tell: receives the lines of its log. Returns the summary. Raises WrongJobError, BrokenOffError."""
    submission = submit(jobs, job)
    tell(f"{submission.id} at {jobs.address}")
    try:
        code = jobs.follow(submission.id, tell)
    except BaseException as error:
        if not isinstance(error, RayJobsError):  # cancelled: an abandoned job would keep the cluster busy
            jobs.stop(submission.id)
        raise
    summary = last_line(jobs.logs(submission.id))
    if code in FINISHED:
        return summary
    message = f"{submission.id} ended with {code}: {summary.get('error', 'see its log')}"
    raise (WrongJobError if code in WRONG else BrokenOffError)(message)


def check(summary: dict[str, Any], max_failed_share: float = 0.01) -> str:
    """Return the path of OUTPUT. Raises WrongJobError if a larger share of the rows failed."""
    share = summary["failed"] / max(summary["rows"], 1)
    if share > max_failed_share:
        counts = f"{summary['failed']} of {summary['rows']} rows failed, {share:.1%}"
        limit = f"at most {max_failed_share:.1%} are allowed"
        raise WrongJobError(f"{summary['output']}: {counts}; {limit}: see its report.html")
    return str(summary["output"])


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code: 2 if a retry does not help, 75 if a retry resumes the job."""
    parser = argparse.ArgumentParser(
        "python -m context_diffusion.nightly", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("step", choices=("ready", "run"), help="ready: check the manifest; run: run the job")
    parser.add_argument("job", type=Path, metavar="JOB", help="a job file with {day} in its paths")
    today = datetime.now(UTC).date().isoformat()
    parser.add_argument("--day", default=today, help="the value of {day}; default: today, UTC")
    share_help = "the largest accepted share of failed rows; default: %(default)s"
    parser.add_argument("--max-failed-share", type=float, default=0.01, help=share_help)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        job = read_job(options.job, options.day)
        jobs = RayJobs.known()
        if options.step == "ready":
            print(json.dumps(check_ready(jobs, job)))
        else:
            print(check(run(jobs, job, lambda line: print(line, file=sys.stderr)), options.max_failed_share))
    except (WrongJobError, BrokenOffError, RayJobsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
