"""Checkpoints that resume exactly: one file, replaced in one step, so a crash or a full disk leaves the last one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from context_diffusion.errors import ModelError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path`, then renames: `path` is always a whole checkpoint."""
    beside = path.with_suffix(".writing")
    try:
        torch.save(state, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that was saved, None where there is none yet. Tensors and plain values only."""
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: not a readable checkpoint ({error}); remove it to start that stage anew") from error


class Metrics:
    """Appends a JSON line a report to metrics.jsonl, from the first worker."""

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.path, self.first = folder / "metrics.jsonl", first

    def write(self, **values: Any) -> None:
        if not self.first:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **values}) + "\n")


class Progress:
    """How far a stage is, 0 to 1: by steps where they are limited, else by the minutes that its threads computed.

    Processor time, not the clock: a run that shares its machine, or is paused, is not cut short by it.
    """

    def __init__(self, minutes: float, max_steps: int | None, threads: int, spent: float = 0.0) -> None:
        self.seconds, self.max_steps, self.threads, self.spent = minutes * 60, max_steps, threads, spent
        self.started = time.process_time()
        self.elapsed = spent  # what the workers agree on

    @property
    def measured(self) -> float:
        """Seconds that this process computed, earlier runs included."""
        return self.spent + (time.process_time() - self.started) / self.threads

    def at(self, step: int) -> float:
        share = step / self.max_steps if self.max_steps else self.elapsed / self.seconds
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """A factor: a short warm-up, flat for the first half, then linear to a fiftieth."""
        return min(1.0, (step + 1) / 50) * max(0.02, min(1.0, 2 * (1 - self.at(step))))
