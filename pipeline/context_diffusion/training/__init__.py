"""Training the native model: data made by rule, losses, loop. Importing this costs no torch."""

from __future__ import annotations

from typing import Any

from context_diffusion.training.config import TrainingJob


def run_training(job: TrainingJob) -> dict[str, Any]:
    """Trains in this process, from where an earlier run stopped; returns the summary. (ray_train.py: several workers.)"""
    from context_diffusion.training.run import run

    summary = run(job)
    assert summary is not None
    return summary
