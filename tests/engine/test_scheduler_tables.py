"""Every table against its diffusers scheduler, over all steps, to a relative 1e-5."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.settings import SchedulerName
from context_diffusion.engine.scheduler_tables import SAMPLERS, make_table
from support.diffusers_reference import REFERENCES

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

COSINE = {"beta_schedule": "squaredcos_cap_v2"}

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def config(prediction: str, spacing: str, **more: Any) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        **more,
    }


def config_for(
    scheduler: str, prediction: str = "epsilon", spacing: str = "leading", **more: Any
) -> dict[str, Any]:
    return FLOW if scheduler == "flow_euler" else config(prediction, spacing, **more)


def reference_of(scheduler: SchedulerName, settings: dict[str, Any], steps: int) -> Any:
    name, own = REFERENCES[scheduler]
    made = getattr(diffusers, name).from_config(settings, **own)
    made.set_timesteps(steps)
    return made


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest value: single values near zero are differences of large ones."""
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def comparable(scheduler: str, prediction: str, spacing: str, steps: int, more: dict[str, Any]) -> bool:
    """Where diffusers itself has an answer to compare with."""
    if scheduler in ("lcm", "tcd"):  # spaced as their own training was
        return steps <= 50 and spacing == "leading"
    if scheduler.endswith("_trailing"):  # whatever the model's own spacing is
        return comparable(scheduler.removesuffix("_trailing"), prediction, "trailing", steps, more)
    if scheduler == "flow_euler":  # predicts the flow, over sigmas of its own
        return prediction == "epsilon" and spacing == "leading" and more is STABLE_DIFFUSION
    if scheduler in ("ddim", "ddpm"):
        return True
    if prediction == "sample" and scheduler in ("euler", "euler_a"):  # they refuse it
        return False
    if steps == 1 and (
        spacing != "trailing" or scheduler.startswith("dpmpp")
    ):  # sigmas between two timesteps
        return False
    # Sigma begins at 2e4 there: its own float32 step loses the digits that are compared.
    return more is not COSINE or (spacing == "leading" and scheduler != "dpmpp_2m_karras")


CASES = [
    case
    for case in itertools.product(
        list(REFERENCES),
        ["epsilon", "v_prediction", "sample"],
        ["leading", "trailing", "linspace"],
        [1, 2, 4, 8, 20, 50, 100],
        [STABLE_DIFFUSION, COSINE],
    )
    if comparable(*case)
]


def test_every_sampler_is_compared() -> None:
    assert list(REFERENCES) == list(SAMPLERS)


@pytest.mark.parametrize(("scheduler", "prediction", "spacing", "steps", "more"), CASES)
def test_a_table_steps_as_its_scheduler(
    scheduler: SchedulerName, prediction: str, spacing: str, steps: int, more: dict[str, Any]
) -> None:
    first = {4: 1, 20: 5, 100: 5}.get(steps, 0)  # those as image to image
    settings = config_for(scheduler, prediction, spacing, **more)
    reference = reference_of(scheduler, settings, steps)
    table = make_table(scheduler, steps, settings, first)
    if first and hasattr(reference, "set_begin_index"):
        reference.set_begin_index(first)
    timesteps = reference.timesteps[first:]
    assert len(table) == len(timesteps)
    generator = torch.Generator().manual_seed(steps)
    shape = (1, 4, 8, 8)
    ours = torch.randn(shape, generator=generator).double() * table.init_scale
    theirs, before = ours.float(), torch.zeros(shape, dtype=torch.float64)
    drawn, draws = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for step, timestep in enumerate(timesteps):
        output = torch.randn(shape, generator=generator)
        scale_in, p, q, a, b, c, d = table.coefficients[step].tolist()
        assert table.timesteps[step] == pytest.approx(float(timestep))
        if hasattr(reference, "scale_model_input"):
            close(ours * scale_in, reference.scale_model_input(theirs, timestep))
        theirs = reference.step(
            output, timestep, theirs, **({} if scheduler.startswith("ddim") else {"generator": drawn})
        ).prev_sample
        noise = torch.randn(shape, generator=draws).double() if d else torch.zeros(shape)
        x0 = p * ours + q * output
        ours, before = a * ours + b * output + c * before + d * noise, x0
        close(ours, theirs)
        ours = theirs.double()  # each step for itself: their float32 loses digits over 333 steps


@pytest.mark.parametrize("scheduler", list(REFERENCES))
@pytest.mark.parametrize("first", [0, 7, 19])
def test_an_image_is_noised_as_the_scheduler_does(scheduler: SchedulerName, first: int) -> None:
    settings = config_for(scheduler, **STABLE_DIFFUSION)
    reference = reference_of(scheduler, settings, 20)
    image, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = make_table(scheduler, 20, settings, first).noised
    add = reference.scale_noise if scheduler == "flow_euler" else reference.add_noise
    at = reference.timesteps[first : first + 1]
    theirs = add(image, at, noise) if scheduler == "flow_euler" else add(image, noise, at)
    torch.testing.assert_close(image * a + noise * b, theirs, rtol=1e-5, atol=1e-5)


# What a model's own scheduler_config says, and the samplers that read it.
FOLLOWED: list[tuple[SchedulerName, dict[str, Any]]] = [
    ("dpmpp_2m", {"use_karras_sigmas": True}),
    ("dpmpp_2m", {"use_exponential_sigmas": True}),
    ("dpmpp_2m", {"solver_order": 1}),
    ("dpmpp_2m", {"solver_type": "heun"}),
    ("dpmpp_2m", {"use_lu_lambdas": True}),
    ("dpmpp_2m", {"euler_at_final": True}),
    ("dpmpp_2m_karras", {"solver_order": 1}),
    ("dpmpp_sde", {"use_karras_sigmas": True}),
    ("euler", {"use_karras_sigmas": True}),
    ("euler", {"use_exponential_sigmas": True}),
    ("euler", {"interpolation_type": "log_linear"}),
    ("ddim", {"rescale_betas_zero_snr": True, "set_alpha_to_one": False, "steps_offset": 1}),
]


@pytest.mark.parametrize(("scheduler", "own"), FOLLOWED)
def test_the_models_scheduler_config_is_followed(scheduler: SchedulerName, own: dict[str, Any]) -> None:
    """Held against a diffusers user's `from_config` of the same configuration."""
    settings = (
        config(
            "v_prediction" if "rescale_betas_zero_snr" in own else "epsilon", "linspace", **STABLE_DIFFUSION
        )
        | own
    )
    reference, table = reference_of(scheduler, settings, 12), make_table(scheduler, 12, settings)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double() * table.init_scale
    assert torch.equal(table.timesteps, reference.timesteps.float())
    before, draws = torch.zeros_like(latents), torch.Generator().manual_seed(5)
    drawn = {} if scheduler == "ddim" else {"generator": torch.Generator().manual_seed(5)}
    for step, timestep in enumerate(reference.timesteps):
        output = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        if hasattr(reference, "scale_model_input"):
            reference.scale_model_input(latents.float(), timestep)
        _, p, q, a, b, c, d = table.coefficients[step].tolist()
        theirs = reference.step(output, timestep, latents.float(), **drawn).prev_sample
        noise = torch.randn(1, 4, 8, 8, generator=draws).double() if d else torch.zeros_like(latents)
        x0 = p * latents + q * output
        ours, before = a * latents + b * output + c * before + d * noise, x0
        close(ours, theirs)
        latents = theirs.double()


@pytest.mark.parametrize(
    ("scheduler", "own", "told"),
    [
        ("dpmpp_2m", {"solver_order": 3}, "solver_order 3"),
        ("dpmpp_2m_karras", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("flow_euler", {}, "predicts epsilon; choose ddim"),
        ("flow_euler", {"prediction_type": "v_prediction"}, "predicts v_prediction"),
        ("euler", FLOW, "predicts a flow; choose flow_euler"),
        ("dpmpp_2m", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "choose flow_euler"),
    ],
)
def test_a_sampler_that_the_models_scheduler_config_does_not_fit_is_refused_by_name(
    scheduler: SchedulerName, own: dict[str, Any], told: str
) -> None:
    with pytest.raises(RowError, match=f"scheduler {scheduler}.*{told}") as caught:
        make_table(scheduler, 10, config("epsilon", "leading", **STABLE_DIFFUSION) | own)
    assert caught.value.code == ErrorCode.INVALID_SETTING


CLIPPING = ("ddim", "ddim_trailing", "ddpm", "tcd", "lcm")
BOUNDED = {
    "clip_sample": CLIPPING,
    "thresholding": (*CLIPPING, "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde"),
}


@pytest.mark.parametrize("option", list(BOUNDED))
@pytest.mark.parametrize("scheduler", [name for name in SAMPLERS if name != "flow_euler"])
def test_what_is_not_linear_is_refused_by_name_and_what_a_sampler_does_not_read_is_ignored(
    option: str, scheduler: SchedulerName
) -> None:
    plain = config("epsilon", "leading", **STABLE_DIFFUSION)
    if scheduler not in BOUNDED[option]:
        table = make_table(scheduler, 10, plain | {option: True})
        assert torch.equal(table.coefficients, make_table(scheduler, 10, plain).coefficients)
        return
    with pytest.raises(
        RowError, match=f"scheduler {scheduler}: .* has {option}, .* choose .*euler"
    ) as caught:
        make_table(scheduler, 10, plain | {option: True})
    assert caught.value.code == ErrorCode.INVALID_SETTING


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_too_many_steps_for_a_sampler_is_the_rows_fault(scheduler: SchedulerName) -> None:
    with pytest.raises(RowError, match=f"scheduler {scheduler} with 60 steps") as caught:
        make_table(scheduler, 60, config("epsilon", "leading", **STABLE_DIFFUSION))
    assert caught.value.code == ErrorCode.INVALID_SETTING


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_x0_of_tcd_is_the_one_that_ddim_predicts_at_its_timesteps(prediction: str) -> None:
    """Its class does not return it."""
    settings = config(prediction, "leading", **STABLE_DIFFUSION)
    table = make_table("tcd", 4, settings)
    ddim = reference_of("ddim", settings, 4)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, (_, p, q, *_) in zip(table.timesteps.long(), table.coefficients.tolist(), strict=True):
        close(p * x.double() + q * output, ddim.step(output, timestep, x).pred_original_sample)


def test_a_trailing_sampler_starts_from_pure_noise_and_a_base_that_is_trailing_needs_none() -> None:
    """SDXL's own configuration is leading: its first timestep of 4 is 751."""
    leading = config("epsilon", "leading", steps_offset=1, **STABLE_DIFFUSION)
    for name in ("euler", "ddim"):
        table = make_table(f"{name}_trailing", 4, leading)  # type: ignore[arg-type]
        assert table.timesteps.tolist() == [999, 749, 499, 249]
        assert make_table(name, 4, leading).timesteps.tolist() == [751, 501, 251, 1]  # type: ignore[arg-type]
        own = make_table(name, 4, leading | {"timestep_spacing": "trailing"})  # type: ignore[arg-type]
        assert torch.equal(own.coefficients, table.coefficients)
