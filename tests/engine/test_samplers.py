"""Every table against its diffusers scheduler, over all steps, to a relative 1e-5."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from context_diffusion.engine.samplers import make_table
from context_diffusion.errors import ModelError

REFERENCES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def config(prediction: str, spacing: str, **more: Any) -> dict[str, Any]:
    return {"num_train_timesteps": 1000, "clip_sample": False, "prediction_type": prediction, "timestep_spacing": spacing, **more}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest value: single values near zero are differences of large ones."""
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def comparable(scheduler: str, prediction: str, spacing: str, steps: int, more: dict[str, Any]) -> bool:
    """Where diffusers itself has an answer to compare with."""
    if scheduler == "ddim":
        return True
    if prediction == "sample":  # its Euler refuses it
        return False
    if steps == 1 and spacing != "trailing":  # it interpolates its sigmas between two timesteps
        return False
    # Sigma begins at 2e4 there: its own float32 step loses the digits that are compared.
    return spacing == "leading" or more["beta_schedule"] != "squaredcos_cap_v2"


CASES = [
    case
    for case in itertools.product(
        ["ddim", "euler"],
        ["epsilon", "v_prediction", "sample"],
        ["leading", "trailing", "linspace"],
        [1, 2, 20, 50, 333],
        [STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}],
    )
    if comparable(*case)
]


@pytest.mark.parametrize(("scheduler", "prediction", "spacing", "steps", "more"), CASES)
def test_a_table_steps_as_its_scheduler(scheduler: str, prediction: str, spacing: str, steps: int, more: dict[str, Any]) -> None:
    settings = config(prediction, spacing, **more)
    reference = REFERENCES[scheduler].from_config(settings)
    reference.set_timesteps(steps)
    table = make_table(scheduler, steps, settings)
    generator = torch.Generator().manual_seed(steps)
    noise = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    theirs, ours = noise * reference.init_noise_sigma, noise * table.init_scale
    assert len(table) == len(reference.timesteps)
    for step, timestep in enumerate(reference.timesteps):
        output = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
        scale_in, p, q, a, b, c, d = table.coefficients[step].double().tolist()
        assert table.timesteps[step] == pytest.approx(float(timestep))
        close(ours * scale_in, reference.scale_model_input(theirs, timestep))
        theirs = reference.step(output, timestep, theirs).prev_sample
        ours = a * ours + b * (p * ours + q * output)
        assert (c, d) == (0, 0)
        close(ours, theirs)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_an_image_is_noised_as_the_scheduler_does(scheduler: str) -> None:
    settings = config("epsilon", "leading", **STABLE_DIFFUSION)
    reference = REFERENCES[scheduler].from_config(settings)
    reference.set_timesteps(20)
    table = make_table(scheduler, 20, settings)
    image, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in (0, 7, 19):
        a, b = table.noised[step].tolist()
        theirs = reference.add_noise(image, noise, reference.timesteps[step : step + 1])
        torch.testing.assert_close(image * a + noise * b, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(ModelError, match="clip_sample"):
        make_table("ddim", 10, config("epsilon", "leading") | {"clip_sample": True})
