"""Gradients that are no numbers: the step is left out, told, and the end of a run that has no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.training_job import TrainJob
from context_diffusion.training.data.encoded_pools import encode_pool
from context_diffusion.training.diffusion import Run
from context_diffusion.training.loop.optimizer import LOOK, Clipping
from support.tiny import SIZES, make_tiny
from support.training_steps import pool


def weight(gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(3))
    made.grad = torch.full((3,), gradient)
    return made


def test_a_norm_is_bounded_and_numbers_stay_as_they_are() -> None:
    large, small, beside = weight(30.0), weight(0.1), weight(7.0)
    Clipping([large], [beside], torch.device("cpu")).bound()
    Clipping([small], [], torch.device("cpu")).bound()
    assert large.grad is not None
    assert small.grad is not None
    assert beside.grad is not None
    assert large.grad.norm() == pytest.approx(1, rel=1e-4)
    assert small.grad.tolist() == pytest.approx([0.1] * 3)
    assert beside.grad.tolist() == [7.0] * 3


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_without_numbers_is_left_out_and_most_of_them_end_the_run(broken: float) -> None:
    weights = [weight(broken), weight(1.0), weight(5.0)]
    clipping = Clipping(weights[:2], weights[2:], torch.device("cpu"))
    clipping.bound()
    assert all(one.grad is not None and not one.grad.any() for one in weights)
    assert (clipping.left_out(), clipping.left_out()) == (1, 0)
    for _ in range(LOOK // 2 + 1):
        weights[0].grad = torch.full((3,), broken)
        clipping.bound()
    with pytest.raises(
        ModelError, match=rf"of {LOOK // 2 + 1} of the last {LOOK} steps .* lower learning_rate"
    ):
        clipping.left_out()


def test_training_goes_on_after_a_step_whose_backward_pass_gives_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = TrainJob.model_validate(
        {"kind": "train", "output": str(tmp_path), "max_steps": 4, "diffusion": {"batch_size": 4}}
    )
    model = make_tiny(SIZES)
    run, source = Run(job, model, tmp_path, {}), encode_pool(model, pool(SIZES.image_size))
    whole = run.backward

    def backward(source: object, rows: object, share: float) -> Tensor:
        loss = whole(source, rows, share)  # type: ignore[arg-type]
        if run.step == 1:  # as cuDNN's attention does: the loss is a number, one layer's gradients are none
            next(p for p in run.modules.parameters() if p.grad is not None).grad.fill_(np.nan)  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(run, "backward", backward)
    assert all(run.train_step(source).isfinite() for _ in range(4))
    assert all(
        value.isfinite().all() for value in (*run.modules.state_dict().values(), *run.average.values())
    )
    assert run.clipping.left_out() == 1
