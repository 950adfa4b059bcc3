"""A scheduler as a table: every step of every sampler is the same fused update with other coefficients.

    model input   scale_in · x   at `timestep`
    x0          = p · x + q · out
    x'          = a · x + b · out + c · x0_before + d · noise

A step of these schedulers is linear in x, the model's output, the x0 before and the noise. So a table is made
by asking the diffusers scheduler itself what its step does to unit values; a new sampler is a line in
SAMPLERS."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.settings import FLOW_SCHEDULERS, SchedulerName, suitable_schedulers

# By name: its class in diffusers, and the options that replace those of the model's scheduler_config.
SAMPLERS: dict[SchedulerName, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "tcd": ("TCDScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
NOT_LINEAR = ("clip_sample", "thresholding")  # options of diffusers' schedulers that bound the x0
X, OUT, BEFORE, NOISE = range(4)  # the unit values of a probe


@dataclass(frozen=True)
class Table:
    """The coefficients of S steps, from the row's first one on.

    timesteps: (S,), as the model reads them. coefficients: (S, 7) float64, columns scale_in, p, q, a, b, c,
    d. init_scale: what pure noise is multiplied with at the start. noised: factors of image and noise where
    the first step starts from an image (image to image)."""

    timesteps: Tensor
    coefficients: Tensor
    init_scale: float
    noised: tuple[float, float]

    def __len__(self) -> int:
        return len(self.timesteps)


def make_scheduler(
    scheduler: SchedulerName,
    num_inference_steps: int,
    config: Mapping[str, Any],
    schedule: Mapping[str, Any] | None = None,
) -> Any:
    """Make the diffusers scheduler that a sampler stands for, with its timesteps. Raises RowError where the
    model's scheduler_config and the sampler do not go together or have no such number of steps.

    schedule: further arguments of `set_timesteps`."""
    if reason := _unsuitable(scheduler, config):
        raise RowError(ErrorCode.INVALID_SETTING, f"scheduler {scheduler}: {reason}")
    class_name, overrides = SAMPLERS[scheduler]
    try:
        sampler = getattr(diffusers, class_name).from_config(
            dict(config) | {"clip_sample": False} | overrides
        )
        sampler.set_timesteps(num_inference_steps, **(schedule or {}))
    except (ValueError, ImportError) as error:
        message = f"scheduler {scheduler} with {num_inference_steps} steps: {' '.join(str(error).split())}"
        raise RowError(ErrorCode.INVALID_SETTING, message) from None
    return sampler


def _unsuitable(scheduler: SchedulerName, config: Mapping[str, Any]) -> str | None:
    """Return why the sampler cannot follow the model's scheduler_config; None where it can."""
    suitable = suitable_schedulers(config)
    if scheduler not in suitable:
        predicted = "a flow" if scheduler not in FLOW_SCHEDULERS else config.get("prediction_type", "epsilon")
        return f"the model predicts {predicted}; choose {', '.join(suitable)}"
    if option := _not_linear(scheduler, config):
        linear = [name for name in suitable if not _not_linear(name, config)]
        return f"the model's scheduler_config has {option}, which is not linear; choose {', '.join(linear)}"
    if scheduler.startswith("dpmpp") and (order := config.get("solver_order", 2)) > 2:
        return f"the model's scheduler_config has solver_order {order}, supported are 1 and 2"
    return None


def _not_linear(scheduler: SchedulerName, config: Mapping[str, Any]) -> str | None:
    """The option of the model's scheduler_config that makes a step of the sampler's class not linear."""
    known = inspect.signature(getattr(diffusers, SAMPLERS[scheduler][0])).parameters
    return next((option for option in NOT_LINEAR if config.get(option) and option in known), None)


def make_table(
    scheduler: SchedulerName,
    num_inference_steps: int,
    config: Mapping[str, Any],
    first: int = 0,
    schedule: Mapping[str, Any] | None = None,
) -> Table:
    """Return the table of a sampler over so many steps, from step `first` on: a multistep sampler has no x0
    before it. config: a diffusers scheduler_config. schedule: see make_scheduler. Raises as make_scheduler
    does."""
    config_text, schedule_text = (
        json.dumps(dict(values or {}), sort_keys=True, default=str) for values in (config, schedule)
    )
    return _cached(scheduler, num_inference_steps, config_text, first, schedule_text)


@lru_cache(maxsize=1024)
def _cached(name: SchedulerName, steps: int, config_text: str, first: int, schedule_text: str) -> Table:
    scheduler = make_scheduler(name, steps, json.loads(config_text), json.loads(schedule_text))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    noised = _noised(scheduler, timesteps[:1]) if len(timesteps) else (1.0, 0.0)
    try:
        rows = [_probe(scheduler, timestep, number) for number, timestep in enumerate(timesteps)]
    except (ValueError, NotImplementedError) as error:
        raise RowError(
            ErrorCode.INVALID_SETTING, f"scheduler {name} cannot sample from this model: {error}"
        ) from None
    init_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Table(
        timesteps.float(), torch.tensor(rows, dtype=torch.float64).reshape(-1, 7), init_scale, noised
    )


def _noised(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """Return the factors of image and noise at a timestep."""
    unit, zero = torch.ones(1), torch.zeros(1)
    if hasattr(scheduler, "scale_noise"):
        return float(scheduler.scale_noise(unit, timestep, zero)), float(
            scheduler.scale_noise(zero, timestep, unit)
        )
    return float(scheduler.add_noise(unit, zero, timestep)), float(scheduler.add_noise(zero, unit, timestep))


def _probe(scheduler: Any, timestep: Tensor, number: int) -> list[float]:
    """Return the coefficients of the scheduler's present step, and advance it by one.

    Elements 0 to 3 ask at even steps, 4 to 7 at odd ones: unit x, unit output, unit x0 before, and nothing
    but the noise. The x0 before of those that ask was made in the step before, when the others asked."""
    mine, others = (0, 4) if number % 2 == 0 else (4, 0)
    x, out = torch.zeros(2, 8, 1)
    x[mine + X] = out[mine + OUT] = x[others + BEFORE] = 1.0
    out[others + BEFORE] = -1.0  # q is never positive: their x0, p - q, cannot be 0
    scaled = (
        float(scheduler.scale_model_input(torch.ones(1), timestep))
        if hasattr(scheduler, "scale_model_input")
        else 1.0
    )
    before = _last_x0(scheduler)
    draws = "generator" in scheduler.step.__code__.co_varnames
    output = scheduler.step(
        out, timestep, x, **({"generator": torch.Generator().manual_seed(0)} if draws else {})
    )
    noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).double()
    after, x0 = output.prev_sample.double(), _x0(scheduler, output, timestep, x, out)
    d = after[mine + NOISE] / noise[mine + NOISE]
    after = after - d * noise
    c = 0.0 if before is None else float(after[mine + BEFORE] / before[mine + BEFORE])
    return [
        scaled,
        float(x0[mine + X]),
        float(x0[mine + OUT]),
        float(after[mine + X]),
        float(after[mine + OUT]),
        c,
        float(d),
    ]


def _last_x0(scheduler: Any) -> Tensor | None:
    """Return the x0 that a multistep scheduler remembers; None for any other."""
    x0 = getattr(scheduler, "model_outputs", [None])[-1]
    return None if x0 is None else x0.double()


def _x0(scheduler: Any, output: Any, timestep: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Return the x0 of a step, under the name that the output's class has for it. output: of the step."""
    for name in ("pred_original_sample", "denoised"):
        if hasattr(output, name):
            return getattr(output, name).double()
    if hasattr(output, "pred_noised_sample"):  # TCD does not return the x0 that it predicts, as DDIM does
        ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(1)
        return ddim.step(out, timestep, x).pred_original_sample.double()
    remembered = _last_x0(scheduler)
    if remembered is not None:
        return remembered
    return (x - scheduler.sigmas[scheduler.step_index - 1] * out).double()  # flow matching
