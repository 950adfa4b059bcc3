"""Training the native model: data made by rule, losses, loop. Importing this costs no torch."""

from __future__ import annotations

from typing import Any

from context_diffusion.training.config import TrainJob


def run_training(job: TrainJob) -> dict[str, Any]:
    """Trains as the job says, from where an earlier run stopped; returns the summary of the run."""
    if job.workers > 1:
        from context_diffusion.training.on_ray import train_on_ray

        return train_on_ray(job)
    from context_diffusion.training.run import run

    summary = run(job)
    assert summary is not None
    return summary
