"""Dagster: a partitioned asset of each night's images, generated on a Ray cluster; checks failed rows.

    dagster dev -f jobs/dagster/nightly.py

RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN name the cluster, CONTEXT_DIFFUSION_JOB a job file with {day} in it
(default: ../nightly.yaml). A retry resumes; a run that is terminated stops the Ray job. Dagster needs no Ray
of its own for it."""

from pathlib import Path

import dagster as dg

from context_diffusion import nightly
from context_diffusion.ray_jobs import RayJobs

MAX_FAILED_SHARE = 0.01
JOB = Path(__file__).parents[1] / "nightly.yaml"
daily = dg.DailyPartitionsDefinition(start_date="2026-01-01")


@dg.asset(partitions_def=daily, retry_policy=dg.RetryPolicy(max_retries=5, delay=60))
def context_diffusion_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """The night's images: where they lie, and how many."""
    night = nightly.job_of(context.partition_key, JOB)
    try:
        nightly.check_ready(RayJobs.known(), night)
        summary = nightly.run(RayJobs.known(), night, context.log.info)
    except nightly.NotReadyError as error:
        raise dg.RetryRequested(max_retries=72, seconds_to_wait=300) from error
    except nightly.WrongJobError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    told = {key: summary[key] for key in ("output", "rows", "failed", "images", "images_per_second")}
    return dg.MaterializeResult(
        metadata=told | {"report": dg.MetadataValue.url(f"{summary['output']}/report.html")}
    )


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
