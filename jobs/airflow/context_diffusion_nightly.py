"""Airflow 3: wait for the night's manifest, run the job on a Ray cluster, check what failed, publish where it lies.

A DAG file for the dags folder. Variables of the environment: RAY_API_SERVER_ADDRESS, RAY_AUTH_TOKEN, and
CONTEXT_DIFFUSION_JOB, a job file with {day} in it (default: ../nightly.yaml). A retry resumes; clearing the task too.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pendulum
import yaml
from airflow.sdk import Asset, Metadata, dag, task
from airflow.sdk.bases.sensor import PokeReturnValue
from airflow.sdk.exceptions import AirflowFailException

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs, known_address, known_token

MAX_FAILED_SHARE = 0.01
IMAGES = Asset("context-diffusion-images")


def jobs() -> RayJobs:
    return RayJobs(known_address() or "http://127.0.0.1:8265", known_token())


def job(day: str) -> nightly.Job:
    path = Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or Path(__file__).parents[1] / "nightly.yaml")
    return nightly.of_day(yaml.safe_load(path.read_text()), day)


@dag(schedule="@daily", start_date=pendulum.datetime(2026, 1, 1, tz="UTC"), catchup=False, max_active_runs=1)
def context_diffusion_nightly() -> None:
    @task.sensor(poke_interval=300, timeout=6 * 3600, mode="reschedule")
    def manifest(ds: str) -> PokeReturnValue:
        try:
            return PokeReturnValue(is_done=True, xcom_value=nightly.check_ready(jobs(), job(ds)))
        except nightly.NotReadyError:
            return PokeReturnValue(is_done=False)
        except nightly.WrongJobError as error:
            raise AirflowFailException(str(error)) from None

    @task(retries=5, retry_delay=timedelta(minutes=1), execution_timeout=timedelta(hours=12))
    def images(ds: str) -> dict[str, Any]:
        try:
            return nightly.run(jobs(), job(ds))
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
