"""A training run stopped and resumed is the run that was never stopped, bit for bit; its folder is a
model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from context_diffusion.core.errors import ModelError, StorageError
from context_diffusion.core.training_job import DiffusionSteps, TrainJob
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training import diffusion
from context_diffusion.training.data.batches import Samples, cropped
from context_diffusion.training.loop.checkpoints import (
    SAVE_SECONDS,
    StageSchedule,
    load_checkpoint,
    save_checkpoint,
)
from context_diffusion.training.run import run_training
from support.tiny import SIZES


def job(output: Path, max_steps: int, **diffusion_steps: float) -> TrainJob:
    return TrainJob(
        kind="train",
        output=str(output),
        styles=4,
        pictures=4,
        pool_steps=2,
        cpu_threads=1,
        checkpoint_every=2,
        max_steps=max_steps,
        architecture=SIZES,
        diffusion=DiffusionSteps(**diffusion_steps),
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples on the pictures of samples: they cost more than the training."""
    monkeypatch.setattr(diffusion, "save_samples", lambda *_: None)


@pytest.mark.usefixtures("small")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training(job(tmp_path / "whole", 4))
    saves = []

    def stop_at_second(path: Path, state: dict[str, object]) -> None:
        save_checkpoint(path, state)
        saves.append(path.name)
        if path.name == "diffusion.pt" and state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "save_checkpoint", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run_training(job(tmp_path / "stopped", 4))
    monkeypatch.setattr(diffusion, "save_checkpoint", save_checkpoint)
    summary = run_training(job(tmp_path / "stopped", 4))
    assert summary["steps"] == 4
    whole, resumed = (NativeModel.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped"))
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.modules[name].state_dict()[key]), (name, key)


@pytest.mark.usefixtures("small")
def test_a_checkpoint_of_another_architecture_or_encoder_is_refused_and_stays(tmp_path: Path) -> None:
    first = job(tmp_path, 1)
    run_training(first)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}

    def again(**sizes: object) -> None:
        run_training(first.model_copy(update={"architecture": SIZES.model_copy(update=sizes)}))

    with pytest.raises(
        ModelError, match=r"autoencoder.pt: the checkpoint has another architecture: .* \(16.* there and \(32"
    ):
        again(vae_width=32)
    with pytest.raises(
        ModelError, match=r"diffusion.pt: the checkpoint has another architecture: .*\(32.* there and \(48"
    ):
        again(width=48)
    with pytest.raises(ModelError, match=r"nowhere.* has no readable config .*; expected one of `small`"):
        again(context_encoder=str(tmp_path / "nowhere"))
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}


def test_a_torn_checkpoint_is_told_and_a_failed_save_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ModelError, match="the checkpoint cannot be read"):
        load_checkpoint(path)


def test_a_checkpoint_is_due_every_five_minutes_of_computing() -> None:
    progress = StageSchedule(60, None, 1, torch.device("cpu"), spent=SAVE_SECONDS * 1.5)
    assert not progress.due(), "what an earlier run saved"
    told = []
    for elapsed in (1.9, 2.1, 2.2, 2.9, 4.5):
        progress.elapsed = SAVE_SECONDS * elapsed
        told.append(progress.due())
    assert told == [False, True, False, False, True]


def test_a_crop_is_the_same_place_of_picture_and_control_map_whichever_worker_cuts_it() -> None:
    grid = torch.arange(8 * 16 * 16).reshape(8, 1, 16, 16).float()
    fine = grid.repeat_interleave(4, 2).repeat_interleave(4, 3)  # a latent is 4 x 4 pixels
    samples = Samples(grid, torch.zeros(0, 3, 8, 8), np.zeros(8, np.int64), grid + 0.5, [""] * 8, fine)

    def cut(rows: list[int]) -> Samples:
        mine = replace(samples, latents=grid[rows], controls=grid[rows] + 0.5, drafts=fine[rows])
        return cropped(mine, np.array(rows), 8, torch.Generator().manual_seed(3))

    whole, parts = cut(list(range(8))), [cut([0, 2, 5]), cut([1, 3, 4, 6, 7])]
    assert whole.latents.shape == (8, 1, 8, 8)
    assert torch.equal(whole.controls, whole.latents + 0.5)
    assert torch.equal(whole.drafts[:, :, ::4, ::4], whole.latents)
    assert whole.drafts.shape[-1] == 32
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents[[0, 2, 5, 1, 3, 4, 6, 7]])
    corners = {divmod(int(one[0, 0, 0]) % 256, 16) for one in whole.latents}
    assert len(corners) > 4
    assert all(torch.equal(one[0, 0], one[0, 0, 0] + torch.arange(8)) for one in whole.latents)


@pytest.mark.usefixtures("small")
def test_crops_are_learned_first_and_then_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = diffusion.noised
    monkeypatch.setattr(diffusion, "noised", lambda x, *more: (seen.append(x.shape[-1]), plain(x, *more))[1])
    run_training(job(tmp_path, max_steps=4, crops=0.5))
    side = SIZES.image_size // 8
    assert [size for size in seen if size == side // 2] == [side // 2] * 2
