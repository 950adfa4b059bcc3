"""Prefect 3: wait for the night's manifest, run the job on a Ray cluster, check what failed, publish where it lies.

    python jobs/prefect/nightly.py            # serves it, every night at two

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster, CONTEXT_DIFFUSION_JOB a job file with {day} in it (default:
../nightly.yaml). A retry resumes; a cancelled flow stops the Ray job.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, task
from prefect.artifacts import create_link_artifact
from prefect.logging import get_run_logger

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs, known_address, known_token

MAX_FAILED_SHARE = 0.01


def jobs() -> RayJobs:
    return RayJobs(known_address() or "http://127.0.0.1:8265", known_token())


def worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    return not isinstance(state.result(raise_on_failure=False), nightly.WrongJobError)


@task(retries=72, retry_delay_seconds=300, retry_condition_fn=worth_a_retry)
def manifest(job: nightly.Job) -> dict[str, Any]:
    return nightly.check_ready(jobs(), job)


@task(retries=5, retry_delay_seconds=60, retry_condition_fn=worth_a_retry)
def images(job: nightly.Job) -> dict[str, Any]:
    return nightly.run(jobs(), job, get_run_logger().info)


@task
def publish(summary: dict[str, Any]) -> str:
    output = nightly.check(summary, MAX_FAILED_SHARE)
    create_link_artifact(f"{output}/report.html", key="context-diffusion-images", description=f"{summary['rows']} rows")
    return output


@flow(name="context-diffusion-nightly")
def context_diffusion_nightly(day: str | None = None) -> str:
    """day: YYYY-MM-DD, left out: today (UTC). -> where the images lie."""
    path = Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or Path(__file__).parents[1] / "nightly.yaml")
    job = nightly.of_day(yaml.safe_load(path.read_text()), day or datetime.now(UTC).date().isoformat())
    manifest(job)
    return publish(images(job))


if __name__ == "__main__":
    context_diffusion_nightly.serve(name="nightly", cron="0 2 * * *")
