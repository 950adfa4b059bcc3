"""Generate a sample of a job's rows in this process, and estimate what the whole job takes. Knows no Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from context_diffusion.core.errors import JobError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.local_model import LocalModel, Outcome, engines_of, inputs_of
from context_diffusion.generation.stages.generate import requests_of
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.outputs.contact_sheet import Cell

IMAGES_SHOWN = 4  # of one row


def try_rows(
    job: GenerateJob, model: ResolvedModel, tables: list[pa.Table], rows: int
) -> tuple[list[list[Cell]], dict[str, Any]]:
    """Generate a sample of rows.

    tables: loaded rows; rows: the number of rows of the whole manifest. Returns the lines of a contact sheet,
    one per row, and the figures. Raises JobError where no row of the sample could be loaded."""
    sample = [row for table in tables for row in requests_of(table, job.control_kinds, job.matrix) if row]
    if not sample:
        raise JobError(
            "no row of the sample could be loaded, so no image can be generated; --sample N tries more rows"
        )
    requests = [request for row in sample for request in row]
    local = LocalModel(model, job.cluster.cpu_threads, compiled=job.cluster.compile == "auto")
    chunk = job.cluster.chunk or local.chunks[0]  # of the job's engines
    began = time.perf_counter()
    local.generate(
        requests[:1], chunk
    )  # all its steps: what an engine does once in its lifetime does not count
    started = time.perf_counter()
    generated = local.generate(requests, chunk)
    used = _used_share(generated)
    seconds = (time.perf_counter() - started) / len(requests) * used
    outcomes = iter(generated)
    lines = [
        [*inputs_of(row[0]), *[_cell(request, next(outcomes)) for request in row][:IMAGES_SHOWN]]
        for row in sample
    ]
    images = round(rows * len(requests) / sum(map(len, tables)))
    basis = {
        "measured_images": len(requests),
        "warm_up_seconds": round(started - began, 3),
        "filled": round(used, 3),
    }
    return lines, _figures(images, seconds, engines_of(job)) | basis | local.device()


def _used_share(outcomes: list[Outcome]) -> float:
    """Return the share of the model's lanes that a sample used. Few rows leave some empty, the rows of a job
    do not."""
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    paid = sum(result.paid_lane_steps for result in results)
    return sum(result.used_lane_steps for result in results) / paid if paid else 1.0


def _cell(request: Request, outcome: Outcome) -> Cell:
    if isinstance(outcome, Failure):
        width, height = request.output_size
        gray = np.full((height, width, 3), 230, np.uint8)
        return f"{request.id}: {outcome.code}: {outcome.message}", gray
    return (
        f"{request.id}: {request.settings.num_inference_steps} steps, {request.settings.scheduler}",
        outcome.image,
    )


def _figures(images: int, seconds: float, engines: int) -> dict[str, Any]:
    """images: of the whole job; seconds: of one image here, with all lanes used."""
    return {
        "images": images,
        "seconds_per_image": round(seconds, 3),
        "engines": engines,
        "estimated_seconds": round(images * seconds / engines),
    }


def estimate_lines(figures: dict[str, Any]) -> list[str]:
    """Write the figures of `validate` as lines of text."""
    engines = f"{figures['engines']} engine{'s' if figures['engines'] > 1 else ''}"
    device = figures.get("gpu", figures["device"])
    lines = [
        f"{figures['images']} images, {figures['seconds_per_image']} s each on {device}: "
        f"about {_duration(figures['estimated_seconds'])} on {engines} like this one",
        f"measured on {figures['measured_images']} images after one warm-up image "
        f"({figures['warm_up_seconds']} s); the start of Ray and of the engines is not included",
        f"the sample used {figures['filled']:.0%} of the model's lanes; the estimate assumes that the job "
        "uses all of them",
    ]
    if "gpu" in figures:
        lines.append(f"GPU memory: {figures['gpu_used_gib']} of {figures['gpu_memory_gib']} GiB")
    return [*lines, f"images: {figures['pictures']}"]


def _duration(seconds: int) -> str:
    """Write a duration with one or two units, such as 14 s, 3 min 20 s, 2 h 5 min."""
    minutes = seconds // 60
    if minutes == 0:
        return f"{seconds} s"
    return f"{minutes} min {seconds % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
