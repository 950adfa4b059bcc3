"""Airflow 3: waits for the night's manifest, runs the job on a Ray cluster, checks failed rows, publishes the
path.

    cp jobs/airflow/context_diffusion_nightly.py DAGS        # the dags folder

Variables of the environment: RAY_API_SERVER_ADDRESS, RAY_AUTH_TOKEN, and CONTEXT_DIFFUSION_JOB, a job file
with {day} in it (default: ../nightly.yaml). A retry resumes; clearing the task too."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pendulum
from airflow.sdk import Asset, Metadata, dag, task
from airflow.sdk.bases.sensor import PokeReturnValue
from airflow.sdk.exceptions import AirflowFailException

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs

MAX_FAILED_SHARE = 0.01
JOB = Path(__file__).parents[1] / "nightly.yaml"
IMAGES = Asset("context-diffusion-images")


@dag(schedule="@daily", start_date=pendulum.datetime(2026, 1, 1, tz="UTC"), catchup=False, max_active_runs=1)
def context_diffusion_nightly() -> None:
    @task.sensor(poke_interval=300, timeout=6 * 3600, mode="reschedule")
    def manifest(ds: str) -> PokeReturnValue:
        try:
            return PokeReturnValue(
                is_done=True, xcom_value=nightly.check_ready(RayJobs.known(), nightly.job_of(ds, JOB))
            )
        except nightly.NotReadyError:
            return PokeReturnValue(is_done=False)
        except nightly.WrongJobError as error:
            raise AirflowFailException(str(error)) from None

    @task(retries=5, retry_delay=timedelta(minutes=1), execution_timeout=timedelta(hours=12))
    def images(ds: str) -> dict[str, Any]:
        # A task that is stopped stops the Ray job: Airflow calls on_kill, which a function has not.
        signal.signal(signal.SIGTERM, nightly.interrupted)
        try:
            return nightly.run(RayJobs.known(), nightly.job_of(ds, JOB))
        except nightly.WrongJobError as error:
            raise AirflowFailException(str(error)) from None

    @task(outlets=[IMAGES])
    def publish(summary: dict[str, Any]) -> Any:
        try:
            output = nightly.check(summary, MAX_FAILED_SHARE)
        except nightly.WrongJobError as error:
            raise AirflowFailException(str(error)) from None
        yield Metadata(IMAGES, {"output": output, "rows": summary["rows"], "failed": summary["failed"]})
        return output

    made = images()
    manifest() >> made
    publish(made)


context_diffusion_nightly()
