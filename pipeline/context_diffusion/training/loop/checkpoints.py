"""Checkpoints that resume exactly: one file, replaced in one step, so a crash or a full disk leaves the last one."""

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
    """What cannot be written, on a full disk say, becomes a StorageError: torch and safetensors have their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise StorageError(
            f"{path}: cannot be written, {free:.0f} MiB are free there: {error}. The last checkpoint is whole: make room, "
            "and the same command goes on from it"
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path`, then renames: `path` is always a whole checkpoint. Raises StorageError."""
    beside = path.with_suffix(".writing")
    try:
        with writing(path):
            torch.save(state, beside)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_model(model: NativeModel, folder: Path) -> None:
    """Writes beside `folder`, then renames, so that a half-written model never stands there. Raises StorageError."""
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
    """Loads a checkpoint's weights. Raises ModelError naming what differs where they are another architecture's."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [name for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)]
    if differing:
        told = [f"{name} is {saved.get(name, 'absent')} there and {own.get(name, 'absent')} here" for name in differing[:3]]
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ModelError(
            f"{path}: a checkpoint of another architecture: {'; '.join(told)}{more}. Name the model or architecture that it "
            "began with, or another `output:`, or remove that file to begin anew"
        )
    module.load_state_dict(weights)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that was saved, None where there is none yet. Tensors and plain values only."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: not a readable checkpoint ({error}); remove it to start that stage anew") from error


def check_origin(path: Path, then: dict[str, str], now: dict[str, str]) -> None:
    """Raises ModelError where a checkpoint began with something else than this run."""
    if changed := [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]:
        told = ", ".join(f"{name} (digest {then.get(name)} then, {now.get(name)} now)" for name in changed)
        raise ModelError(f"{path} began with another {told}: name another `output:`, or remove that file to begin anew")


class Metrics:
    """Appends a JSON line a report to metrics.jsonl, from the first worker."""

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.path, self.first = folder / "metrics.jsonl", first

    def write(self, **values: Any) -> None:
        if not self.first:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **values}) + "\n")


class StageSchedule:
    """How far a stage is, 0 to 1: by steps where they are limited, else by the minutes that its threads computed.

    Processor time, not the clock: a run that shares its machine, or is paused, is not cut short by it. Of a GPU's time
    only the clock is known.
    """

    def __init__(self, minutes: float, max_steps: int | None, threads: int, device: torch.device, spent: float = 0.0) -> None:
        self.seconds, self.max_steps, self.spent = minutes * 60, max_steps, spent
        self.now, self.threads = (time.process_time, threads) if device.type == "cpu" else (time.monotonic, 1)
        self.started = self.now()
        self.elapsed = spent  # what the workers agree on
        self.saves = int(spent // SAVE_SECONDS)

    @property
    def measured(self) -> float:
        """Seconds that this process computed, earlier runs included."""
        return self.spent + (self.now() - self.started) / self.threads

    def due(self) -> bool:
        """Once every SAVE_SECONDS: time to save, whatever the steps; all workers agree."""
        saves, self.saves = self.saves, int(self.elapsed // SAVE_SECONDS)
        return self.saves > saves

    def at(self, step: int) -> float:
        share = step / self.max_steps if self.max_steps else self.elapsed / self.seconds
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """A factor: a short warm-up, flat for the first half, then linear to a fiftieth."""
        return min(1.0, (step + 1) / 50) * max(0.02, min(1.0, 2 * (1 - self.at(step))))
