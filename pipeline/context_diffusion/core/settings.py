"""A row's settings and their ranges, under diffusers' names where it has one."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import (
    StrictModel,
)

SchedulerName = Literal[
    "ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "lcm", "flow_euler"
]  # fmt: skip

Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

ControlScale = Annotated[float, Field(ge=0, le=10)]

Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]


class Settings(StrictModel):
    """What a row may set for itself, under diffusers' names where it has one."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="left out: derived from the job's seed and the row's id; image k has seed + k"
    )
    num_inference_steps: int = Field(default=20, ge=1, le=1000, description="denoising steps")
    scheduler: SchedulerName = Field(default="ddim", description="the sampler")
    guidance_scale: Scale = Field(default=1.5, description="how strongly the prompt pulls; 1 or less: no guidance")
    context_guidance_scale: Scale | None = Field(
        default=None,
        description="how strongly the contexts pull; left out: as guidance_scale; if more, they stand against the prompt",
    )
    controlnet_conditioning_scale: ControlScale | Annotated[list[ControlScale], Field(min_length=1)] = Field(
        default=1.0, description="how strongly the query's layout holds; a list: for each ControlNet its own"
    )
    control_guidance_start: Fraction = Field(default=0.0, description="share of the steps at which control begins")
    control_guidance_end: Fraction = Field(default=1.0, description="share of the steps at which control ends")
    context_scale: Annotated[float, Field(ge=0, le=10)] = Field(
        default=1.0, description="weight of all contexts against the prompt"
    )
    context_weights: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(
        default=None, description="a weight for each context; left out: all 1"
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="start from the query's pixels with this much noise; left out: from noise alone"
    )
    width: Side | None = Field(default=None, description="pixels, a multiple of 16; left out: the model's size")
    height: Side | None = Field(default=None, description="pixels, a multiple of 16; left out: the model's size")
    num_images: int = Field(default=1, ge=1, le=64, description="images of this row")

    @classmethod
    def from_trusted_json(cls, text: str) -> Self:
        """Read the JSON of settings that `inputs.rows.read_table` validated, without validating it again."""
        return cls.model_construct(**json.loads(text))

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed is not None and self.seed + self.num_images > 2**63:
            last = f"seed + {self.num_images - 1}"
            raise ValueError(f"seed ({self.seed}): the last of num_images ({self.num_images}) has {last}, over 2^63 - 1")
        return self

    @model_validator(mode="after")
    def _window_is_open(self) -> Self:
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError(
                f"control_guidance_start ({self.control_guidance_start:g}) must be below "
                f"control_guidance_end ({self.control_guidance_end:g})"
            )
        return self
