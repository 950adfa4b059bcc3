"""The stage that tells textures from layouts: its pictures, and that it resumes and learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from context_diffusion.core.training_job import ReliefSteps, TrainJob
from context_diffusion.training import texture_separation
from context_diffusion.training.data.layouts import HELD_OUT_FAMILIES
from context_diffusion.training.data.textured_layouts import VARIED, varied_layout
from context_diffusion.training.loop.checkpoints import Metrics, load_checkpoint, save_checkpoint
from context_diffusion.training.texture_separation import draw_examples, split_loss, split_of, train_relief
from support.tiny import SIZES, make_tiny

CPU = torch.device("cpu")
STEPS = ReliefSteps(steps=6, batch_size=4)


def job(output: Path, processes: int = 0) -> TrainJob:
    return TrainJob(
        kind="train",
        output=str(output),
        cpu_threads=1,
        data_processes=processes,
        checkpoint_every=2,
        architecture=SIZES,
        relief=STEPS,
    )


def test_a_picture_follows_from_its_number_and_texture_is_what_a_flat_style_lacks() -> None:
    drawn = draw_examples(3, np.arange(24), 64)
    assert all(
        np.array_equal(a[5:7], b) for a, b in zip(drawn, draw_examples(3, np.array([5, 6]), 64), strict=True)
    )
    split = split_of(drawn, CPU)
    assert split.tones.shape == (24, 2, 64, 64)
    textured = split.texture.abs().mean((1, 2)) > 0.01
    assert 0.4 < textured.float().mean() < 1
    assert not split.texture[~textured].abs().max() > 0.5
    near = (split.structure + split.texture - split.tones[:, 0]).abs().mean((1, 2))
    assert near.median() < 0.1, "but for outlines, light, grain and noise"


@pytest.mark.parametrize("name", VARIED)
def test_families_draw_tones_of_several_kinds(name: str) -> None:
    assert name not in HELD_OUT_FAMILIES
    for seed in range(4):
        tone = VARIED[name](np.random.default_rng(seed), 96)
        assert tone.shape == (96, 96)
        assert 0 <= tone.min() < tone.max() <= 1


def test_layouts_follow_from_the_seed_and_differ() -> None:
    first, again, other = (varied_layout(np.random.default_rng(seed), 64) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32


def test_it_resumes_exactly_and_is_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = make_tiny(SIZES), make_tiny(SIZES)
    train_relief(job(tmp_path / "a", processes=2), whole, folder(tmp_path / "a"), Metrics(tmp_path / "a"))

    def stop(path: Path, state: dict[str, object]) -> None:
        save_checkpoint(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(texture_separation, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train_relief(job(tmp_path / "b"), stopped, folder(tmp_path / "b"), Metrics(tmp_path / "b"))
    monkeypatch.setattr(texture_separation, "save_checkpoint", save_checkpoint)
    resumed = make_tiny(SIZES)
    for _ in range(2):
        train_relief(job(tmp_path / "b"), resumed, folder(tmp_path / "b"), Metrics(tmp_path / "b"))
    state = load_checkpoint(tmp_path / "b" / "relief.pt")
    assert state is not None
    assert state["step"] == STEPS.steps
    for key, value in whole.relief.state_dict().items():
        assert torch.equal(value, resumed.relief.state_dict()[key]), key
    assert whole.relief.learned


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def test_it_learns(tmp_path: Path) -> None:
    model, split = make_tiny(SIZES), split_of(draw_examples(99, np.arange(16), 64), CPU)
    before = split_loss(model.relief, split)
    steps = ReliefSteps(steps=60, batch_size=4)
    train_relief(job(tmp_path).model_copy(update={"relief": steps}), model, tmp_path, Metrics(tmp_path))
    assert split_loss(model.relief, split) < 0.97 * before
