"""The settings of a row and their ranges, named as in diffusers where it has them; and hints for misspelt
names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import StrictModel

SchedulerName = Literal[
    "ddim", "ddim_trailing", "ddpm", "euler", "euler_trailing", "euler_a", "dpmpp_2m", "dpmpp_2m_karras",
    "dpmpp_sde", "tcd", "lcm", "flow_euler"
]  # fmt: skip

Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ControlScale = Annotated[float, Field(ge=0, le=10)]
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class Settings(StrictModel):
    """The settings that each row may have."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="default: derived from the job's seed and the row's id; image k has seed + k",
    )
    num_inference_steps: int = Field(default=20, ge=1, le=1000, description="denoising steps")
    scheduler: SchedulerName = Field(
        default="ddim",
        description="the scheduler (sampler); ddim_trailing and euler_trailing have trailing timestep "
        "spacing; tcd has eta 0.3",
    )
    guidance_scale: Scale = Field(default=1.5, description="prompt guidance strength; 1 or less: no guidance")
    context_guidance_scale: Scale | None = Field(
        default=None,
        description="context guidance strength; default: guidance_scale; a larger value favours the "
        "contexts over the prompt",
    )
    controlnet_conditioning_scale: ControlScale | Annotated[list[ControlScale], Field(min_length=1)] = Field(
        default=1.0, description="strength of the query's layout; a list gives one value per ControlNet"
    )
    control_guidance_start: Fraction = Field(
        default=0.0, description="fraction of the steps at which the ControlNet starts"
    )
    control_guidance_end: Fraction = Field(
        default=1.0, description="fraction of the steps at which the ControlNet ends"
    )
    context_scale: Annotated[float, Field(ge=0, le=10)] = Field(
        default=1.0, description="weight of all contexts relative to the prompt"
    )
    context_weights: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(
        default=None, description="one weight per context; default: 1 for each"
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="image-to-image strength: start from the query with this much noise; default: start "
        "from pure noise",
    )
    width: Side | None = Field(
        default=None,
        description="pixels, a multiple of 16; default: the model's size, or that of the query for FLUX.2",
    )
    height: Side | None = Field(
        default=None,
        description="pixels, a multiple of 16; default: the model's size, or that of the query for FLUX.2",
    )
    num_images: int = Field(default=1, ge=1, le=64, description="images per row")

    @classmethod
    def from_trusted_json(cls, text: str) -> Self:
        """Read the JSON of settings that `inputs.rows.read_table` validated, without validating it again."""
        return cls.model_construct(**json.loads(text))

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed is not None and self.seed + self.num_images > 2**63:
            raise ValueError(
                f"seed ({self.seed}) is too large: image {self.num_images - 1} of num_images would have a "
                "seed over 2^63 - 1"
            )
        return self

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError(
                f"control_guidance_start ({self.control_guidance_start:g}) must be below "
                f"control_guidance_end ({self.control_guidance_end:g})"
            )
        return self


# What A1111, ComfyUI, diffusers' pipelines and data sets call settings and columns.
OTHER_NAMES = {
    "steps": "num_inference_steps",
    "inference_steps": "num_inference_steps",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "ip_adapter_scale": "context_scale",
    "ip_adapter_image": "context",
    "controlnet_scale": "controlnet_conditioning_scale",
    "control_scale": "controlnet_conditioning_scale",
    "denoising_strength": "strength",
    "denoise": "strength",
    "negative": "negative_prompt",
    "batch_size": "num_images",
    "num_images_per_prompt": "num_images",
    "contexts": "context",
    "references": "context",
    "reference": "context",
    "random_seed": "seed",
}


def probable(name: str, known: Iterable[str], cutoff: float = 0.82) -> str | None:
    """Return the known name that a misspelt one probably means; None where none is close.

    cutoff: of difflib's similarity ratio, 0 to 1.
    """
    names = list(known)
    other = OTHER_NAMES.get(name.lower())
    if other in names:
        return other
    close = difflib.get_close_matches(name.lower(), names, 1, cutoff)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the known name that is probably meant, else all known names."""
    names = list(known)
    close = probable(name, names, cutoff=0.5)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(names)}"
