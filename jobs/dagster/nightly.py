"""Dagster: a partitioned asset of each night's images, made by a job on a Ray cluster, and a check of what failed.

    dagster dev -f jobs/dagster/nightly.py

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster, CONTEXT_DIFFUSION_JOB a job file with {day} in it (default:
../nightly.yaml). A retry resumes; a run that is terminated stops the Ray job. Dagster needs no Ray of its own for it.
"""

import os
from pathlib import Path

import dagster as dg
import yaml

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs, known_address, known_token

MAX_FAILED_SHARE = 0.01
daily = dg.DailyPartitionsDefinition(start_date="2026-01-01")


def jobs() -> RayJobs:
    return RayJobs(known_address() or "http://127.0.0.1:8265", known_token())


def job(day: str) -> nightly.Job:
    path = Path(os.environ.get("CONTEXT_DIFFUSION_JOB") or Path(__file__).parents[1] / "nightly.yaml")
    return nightly.of_day(yaml.safe_load(path.read_text()), day)


@dg.asset(partitions_def=daily, retry_policy=dg.RetryPolicy(max_retries=5, delay=60))
def context_diffusion_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """The night's images: where they lie, and how many."""
    night = job(context.partition_key)
    try:
        nightly.check_ready(jobs(), night)
        summary = nightly.run(jobs(), night, context.log.info)
    except nightly.NotReadyError as error:
        raise dg.RetryRequested(max_retries=72, seconds_to_wait=300) from error
    except nightly.WrongJobError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    told = {key: summary[key] for key in ("output", "rows", "failed", "images", "images_per_second")}
    return dg.MaterializeResult(metadata=told | {"report": dg.MetadataValue.url(f"{summary['output']}/report.html")})


@dg.asset_check(asset=context_diffusion_images, blocking=True)
def few_rows_failed(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    event = context.instance.get_latest_materialization_event(context_diffusion_images.key)
    assert event
    assert event.asset_materialization
    metadata = event.asset_materialization.metadata
    summary = {key: metadata[key].value for key in ("output", "rows", "failed")}
    try:
        nightly.check(summary, MAX_FAILED_SHARE)
    except nightly.WrongJobError as error:
        return dg.AssetCheckResult(passed=False, description=str(error))
    return dg.AssetCheckResult(passed=True)


night = dg.define_asset_job("context_diffusion_nightly", [context_diffusion_images], partitions_def=daily)
defs = dg.Definitions(
    assets=[context_diffusion_images],
    asset_checks=[few_rows_failed],
    jobs=[night],
    schedules=[dg.build_schedule_from_partitioned_job(night, hour_of_day=2)],
)
