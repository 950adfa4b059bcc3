"""Two workers on Ray Train, joined by gloo, make one worker's steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from context_diffusion.cluster.supervisor import _members
from context_diffusion.cluster.train_workers import _failure
from context_diffusion.core.errors import ClusterError, ModelError
from context_diffusion.core.training_job import TrainJob
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training import diffusion
from context_diffusion.training.loop.checkpoints import load_checkpoint
from context_diffusion.training.run import run_training
from support.tiny import SIZES

COMMAND = [sys.executable, "-m", "context_diffusion", "run", "/dev/stdin"]
ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0"}


def job(output: Path, **more: object) -> TrainJob:
    values = {
        "styles": 4,
        "pictures": 4,
        "cpu_threads": 1,
        "max_steps": 6,
        "architecture": SIZES.model_dump(),
        **more,
    }
    return TrainJob.model_validate({"kind": "train", "output": str(output), **values})


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_reach_one_workers_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "save_samples", lambda *_: None)
    monkeypatch.setattr(diffusion, "VALIDATION_BATCHES", 4)  # as in the other processes
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
@pytest.mark.slow
def test_an_error_of_a_worker_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "autoencoder.pt").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"autoencoder.pt: not a readable checkpoint"):
        in_a_process(job(tmp_path, workers=2))


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_worker_is_a_fault_from_outside_and_the_last_checkpoint_goes_on(tmp_path: Path) -> None:
    wanted = job(tmp_path, workers=2, max_steps=100_000, checkpoint_every=1)
    with subprocess.Popen(
        COMMAND, stdin=-1, stdout=-1, env=ENVIRONMENT, text=True, start_new_session=True
    ) as process:
        assert process.stdin
        process.stdin.write(wanted.model_dump_json())
        process.stdin.close()
        while not (tmp_path / "relief.pt").exists():
            time.sleep(0.2)
        [*_, last] = [
            pid
            for pid in _members(process.pid)
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(last, signal.SIGKILL)
        told = json.loads(process.stdout.read().strip().splitlines()[-1])  # type: ignore[union-attr]
    assert process.returncode == told["exit"] == 75, told
    assert load_checkpoint(tmp_path / "relief.pt")


@pytest.mark.parametrize("fault", [ModelError("the cause"), TypeError("the cause")])
def test_the_worker_that_failed_is_told_not_the_one_that_misses_it(fault: Exception) -> None:
    gone = WorkerHealthCheckFailedError("a health check failed", RuntimeError())
    assert _failure(WorkerGroupError("", {0: ClusterError("gone"), 1: gone}))["exit"] == 75
    told = _failure(WorkerGroupError("", {0: ClusterError("gone"), 1: fault}))
    assert told["exit"] == (2 if isinstance(fault, ModelError) else 1)
    assert "the cause" in told["error"]


def in_a_process(wanted: TrainJob) -> dict[str, object]:
    """Ray of its own, which ends with it."""
    done = subprocess.run(
        COMMAND,
        input=wanted.model_dump_json(),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    if summary["exit"] == ModelError.exit_code:
        raise ModelError(summary["error"])
    assert summary["exit"] == 0, done.stderr[-3000:]
    return summary
