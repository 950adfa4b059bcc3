"""Two workers on Ray Train, joined by gloo, make one worker's steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_diffusion.errors import ModelError
from context_diffusion.model.native import NativeModel
from context_diffusion.training import diffusion, run_training
from context_diffusion.training.config import TrainJob
from tiny import SIZES


def job(output: Path, **more: object) -> TrainJob:
    values = {"styles": 4, "pictures": 4, "cpu_threads": 1, "max_steps": 6, "architecture": SIZES.model_dump(), **more}
    return TrainJob.model_validate({"kind": "train", "output": str(output), **values})


@pytest.mark.ray
def test_two_workers_reach_one_workers_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "save_samples", lambda *_: None)
    one = run_training(job(tmp_path / "one"))
    two = in_a_process(job(tmp_path / "two", workers=2))
    assert one["steps"] == two["steps"] == 6
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=5e-3)
    alone, together = (NativeModel.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for name in ("unet", "controlnet", "fusion"):
        for key, value in alone.modules[name].state_dict().items():
            # Six steps of AdamW at 1e-3 move a weight by 1e-3 or so: bf16's rounding is far below.
            torch.testing.assert_close(together.modules[name].state_dict()[key], value, atol=2e-3, rtol=0)


@pytest.mark.ray
def test_an_error_of_a_worker_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "autoencoder.pt").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"autoencoder.pt: not a readable checkpoint"):
        in_a_process(job(tmp_path, workers=2))


def in_a_process(wanted: TrainJob) -> dict[str, object]:
    """Ray of its own, which ends with it."""
    done = subprocess.run(
        [sys.executable, "-m", "context_diffusion", "run", "/dev/stdin"],
        input=wanted.model_dump_json(),
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_worker_niceness": "0"},
        timeout=240,
    )
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    if summary["exit"] == ModelError.exit_code:
        raise ModelError(summary["error"])
    assert summary["exit"] == 0, done.stderr[-3000:]
    return summary
