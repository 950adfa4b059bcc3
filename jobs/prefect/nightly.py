"""Prefect 3: waits for the night's manifest, runs the job on a Ray cluster, checks failed rows, publishes the
path.

    python jobs/prefect/nightly.py            # serves it, every night at two

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster, CONTEXT_DIFFUSION_JOB a job file with {day} in it
(default: ../nightly.yaml). A retry resumes; a cancelled flow stops the Ray job."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact
from prefect.logging import get_run_logger

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs

MAX_FAILED_SHARE = 0.01
JOB = Path(__file__).parents[1] / "nightly.yaml"


def worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    return not isinstance(state.result(raise_on_failure=False), nightly.WrongJobError)


@task(retries=72, retry_delay_seconds=300, retry_condition_fn=worth_a_retry)
def manifest(job: nightly.Job) -> dict[str, Any]:
    return nightly.check_ready(RayJobs.known(), job)


@task(retries=5, retry_delay_seconds=60, retry_condition_fn=worth_a_retry)
def images(job: nightly.Job) -> dict[str, Any]:
    return nightly.run(RayJobs.known(), job, get_run_logger().info)


@task
def publish(summary: dict[str, Any]) -> str:
    output = nightly.check(summary, MAX_FAILED_SHARE)
    create_link_artifact(
        f"{output}/report.html", key="context-diffusion-images", description=f"{summary['rows']} rows"
    )
    return output


@flow(name="context-diffusion-nightly")
def context_diffusion_nightly(day: str | None = None) -> str:
    """day: YYYY-MM-DD, left out: today (UTC). -> where the images lie."""
    job = nightly.job_of(day or datetime.now(UTC).date().isoformat(), JOB)
    manifest(job)
    return publish(images(job))


if __name__ == "__main__":
    context_diffusion_nightly.serve(name="nightly", cron="0 2 * * *")
