"""Checkpoints that resume exactly; metrics; and the schedule of a stage. A checkpoint is one file, replaced
atomically."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from context_diffusion.core.errors import ModelError, StorageError
from context_diffusion.models.native.model import NativeModel

SAVE_SECONDS = 300  # that a killed run loses at most


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise StorageError for a failed write, such as on a full disk: torch and safetensors have errors of
    their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise StorageError(
            f"{path}: cannot be written ({free:.0f} MiB are free): {error}. Free some space, then rerun the "
            "same command to resume from the last checkpoint"
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside `path`, then rename, so that `path` is always a whole checkpoint. Raises StorageError."""
    beside = path.with_suffix(".writing")
    try:
        with writing(path):
            torch.save(state, beside)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_model(model: NativeModel, folder: Path) -> None:
    """Write beside `folder`, then rename, so that it never holds a half-written model. Raises
    StorageError."""
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(folder):
            model.save_pretrained(beside)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load a checkpoint's weights. Raises ModelError naming what differs if they are of another
    architecture."""
    current = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [
        name for name in sorted(current.keys() | saved.keys()) if current.get(name) != saved.get(name)
    ]
    if differing:
        examples = [
            f"{name} is {saved.get(name, 'absent')} there and {current.get(name, 'absent')} here"
            for name in differing[:3]
        ]
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ModelError(
            f"{path}: the checkpoint has another architecture: {'; '.join(examples)}{more}. Use the model or "
            "architecture that it was started with, another `output:`, or remove the file to start again"
        )
    module.load_state_dict(weights)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Load the saved state, tensors and plain values only; None: there is none yet."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"{path}: the checkpoint cannot be read ({error}); remove it to start that stage again"
        ) from error


def check_origin(path: Path, then: dict[str, str], now: dict[str, str]) -> None:
    """Raise ModelError if a checkpoint began with something else than this run."""
    if changed := [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]:
        changes = ", ".join(f"{name} (digest {then.get(name)} then, {now.get(name)} now)" for name in changed)
        raise ModelError(
            f"{path} was started with another {changes}: use another `output:`, or remove the file to "
            "start again"
        )


class Metrics:
    """Append JSON lines to metrics.jsonl, on the first worker."""

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.path, self.first = folder / "metrics.jsonl", first

    def write(self, **values: Any) -> None:
        if not self.first:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **values}) + "\n")


class StageSchedule:
    """The progress of a stage, 0 to 1: by steps if they are limited, else by minutes of computing.

    On a CPU these are processor time, so that a run that is paused or shares its machine is not cut short; on
    a GPU they are wall-clock time."""

    def __init__(
        self, minutes: float, max_steps: int | None, threads: int, device: torch.device, spent: float = 0.0
    ) -> None:
        self.seconds, self.max_steps, self.spent = minutes * 60, max_steps, spent
        self.now, self.threads = (time.process_time, threads) if device.type == "cpu" else (time.monotonic, 1)
        self.started = self.now()
        self.elapsed = spent  # what the workers agree on
        self.saves = int(spent // SAVE_SECONDS)

    @property
    def measured(self) -> float:
        """Seconds that this process has computed, earlier runs included."""
        return self.spent + (self.now() - self.started) / self.threads

    def due(self) -> bool:
        """Return whether a save is due, once every SAVE_SECONDS; all workers agree."""
        saves = self.saves
        self.saves = int(self.elapsed // SAVE_SECONDS)
        return self.saves > saves

    def at(self, step: int) -> float:
        share = step / self.max_steps if self.max_steps else self.elapsed / self.seconds
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """Return a factor of the learning rate: a short warm-up, flat for the first half, then linear to a
        fiftieth."""
        return min(1.0, (step + 1) / 50) * max(0.02, min(1.0, 2 * (1 - self.at(step))))
