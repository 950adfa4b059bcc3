"""The pictures of a sample of a job's rows, made in this process, and what the whole job will take by them. No Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from context_diffusion.core.errors import JobError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.generation.local_model import Maker, Outcome, engines_of, inputs_of
from context_diffusion.generation.stages import requests_of
from context_diffusion.models.resolve import Source
from context_diffusion.outputs.contact_sheet import Cell

SHOWN = 4  # pictures of one row


def try_rows(job: GenerateJob, model: Source, tables: list[pa.Table], rows: int) -> tuple[list[list[Cell]], dict[str, Any]]:
    """tables: loaded rows; rows: of the whole manifest. -> a sheet's lines, one a row, and the figures. Raises JobError where
    no row of the sample can be made."""
    wanted = [row for table in tables for row in requests_of(table, job) if row]
    if not wanted:
        raise JobError("no row of the sample can be loaded, so there are no pictures to make; --sample N looks at more")
    requests = [request for row in wanted for request in row]
    maker = Maker(job, model)
    began = time.perf_counter()
    maker.make(requests[:1])  # all its steps: what an engine does once in its life does not count
    started = time.perf_counter()
    made = maker.make(requests)
    seconds = (time.perf_counter() - started) / len(requests) * _filled(made)
    outcomes = iter(made)
    lines = [[*inputs_of(row[0]), *[_cell(request, next(outcomes)) for request in row][:SHOWN]] for row in wanted]
    images = round(rows * len(requests) / sum(map(len, tables)))
    basis = {"measured_images": len(requests), "warm_up_seconds": round(started - began, 3), "filled": round(_filled(made), 3)}
    return lines, _figures(images, seconds, engines_of(job)) | basis | maker.device()


def _filled(outcomes: list[Outcome]) -> float:
    """The share of the lanes in the model's calls that a sample used: so few rows leave some empty, a job's do not."""
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    paid = sum(result.paid_lane_steps for result in results)
    return sum(result.used_lane_steps for result in results) / paid if paid else 1.0


def _cell(request: Request, outcome: Outcome) -> Cell:
    if isinstance(outcome, Failure):
        return f"{request.id} {outcome.code}: {outcome.message}", np.full_like(request.query, 230)
    return f"{request.id} {request.settings.num_inference_steps} steps {request.settings.scheduler}", outcome.image


def _figures(images: int, seconds: float, engines: int) -> dict[str, Any]:
    """images: of the whole job; seconds: of one here, in full lanes."""
    estimated = {"estimated_seconds": round(images * seconds / engines)}
    return {"images": images, "seconds_per_image": round(seconds, 3), "engines": engines} | estimated


def estimate_lines(told: dict[str, Any]) -> list[str]:
    """The figures for people."""
    minutes, seconds = divmod(told["estimated_seconds"], 60)
    engines = f"{told['engines']} engine{'s' if told['engines'] > 1 else ''}"
    lines = [f"{told['images']} images, {told['seconds_per_image']} s each on {told.get('gpu', told['device'])}"]
    lines[0] += f": about {minutes // 60} h {minutes % 60} min {seconds} s on {engines} like this one"
    warm = f"a first one that warms up ({told['warm_up_seconds']} s, not counted)"
    lines.append(f"measured on {told['measured_images']} images after {warm}; without the start of Ray and of the engines")
    lines.append(f"they filled {told['filled']:.0%} of the model's lanes, a job fills nearly all: the time is of full ones")
    if "gpu" in told:
        lines.append(f"GPU memory: {told['gpu_used_gib']} of {told['gpu_memory_gib']} GiB")
    return [*lines, f"pictures: {told['pictures']}"]
