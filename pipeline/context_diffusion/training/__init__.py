"""Training the native model: data made by rule, losses, loop. Importing this costs no torch."""

from __future__ import annotations

from typing import Any

from context_diffusion.training.config import TrainJob


def run_training(job: TrainJob) -> dict[str, Any]:
    """Trains as the job says, from where an earlier run stopped; returns the summary of the run."""
    from context_diffusion.training.run import run

    return run(job)
