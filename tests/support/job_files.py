"""Job files of one job."""

from __future__ import annotations

from context_diffusion.core.job_base import StrictModel
from context_diffusion.core.job_file import load_jobs


def load_job(path: str, overrides: list[str] | None = None) -> StrictModel:
    [job] = load_jobs(path, overrides)
    return job
