"""The settings of a row and their ranges, named as in diffusers where it has them; and hints for misspelt
names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from context_diffusion.core.job_base import StrictModel

SchedulerName = Literal[
    "ddim", "ddim_trailing", "ddpm", "euler", "euler_trailing", "euler_a", "dpmpp_2m", "dpmpp_2m_karras",
    "dpmpp_sde", "tcd", "lcm", "flow_euler"
]  # fmt: skip

FLOW_SCHEDULERS: tuple[SchedulerName, ...] = ("flow_euler",)  # of flow-matching models, and of no others

Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Fractions = Annotated[list[Fraction], Field(min_length=1)]
ControlScale = Annotated[float, Field(ge=0, le=10)]
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=16)]
CONTEXT_BLOCKS = ("all", "style", "layout", "style+layout")
MAX_BLOCK_SCALE = 10.0


def suitable_schedulers(scheduler_config: Mapping[str, Any]) -> tuple[SchedulerName, ...]:
    """Return the schedulers that go with what a model predicts: a flow, or noise, x0 or v."""
    is_flow = (
        str(scheduler_config.get("_class_name", "")).startswith("FlowMatch")
        or scheduler_config.get("prediction_type") == "flow_prediction"
        or bool(scheduler_config.get("use_flow_sigmas"))
    )
    return tuple(name for name in get_args(SchedulerName) if (name in FLOW_SCHEDULERS) == is_flow)


def _checked_blocks(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """Check the form of `context_blocks`; which blocks there are is known by the model. JSON text is read as
    a mapping."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
    if isinstance(value, dict):
        if not (checked := _checked_scales(value)):
            raise ValueError("the mapping names no block")
        return checked
    if value not in CONTEXT_BLOCKS:
        known = ", ".join(CONTEXT_BLOCKS)
        raise ValueError(f"should be {known}, or a mapping such as {{up: {{block_1: 1.0}}}}")
    return value


def _checked_scales(value: dict[str, Any], side: str | None = None) -> dict[str, Any]:
    """Return a mapping of scales without its null entries, which Arrow adds to the structs of a column.

    side: of which the mapping names blocks; None: it names sides."""
    checked: dict[str, Any] = {}
    for name, scale in value.items():
        place = f"{side}.{name}" if side else name
        if isinstance(scale, dict) and side is None:
            scale = _checked_scales(scale, name) or None
        elif scale is not None and scale == scale:  # NaN is null
            _check_scale(scale, place)
        if scale is not None and scale == scale:
            checked[name] = scale
    return checked


def _check_scale(scale: Any, place: str) -> None:
    """Raise ValueError for what is neither a number in the range of scales nor a list of them."""
    for number in scale if isinstance(scale, list) else [scale]:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number <= MAX_BLOCK_SCALE:
            value = repr(number) if is_number else f"a {type(number).__name__}"
            raise ValueError(
                f"{place} should be a number from 0 to {MAX_BLOCK_SCALE:g} or a list of them, not {value}"
            )


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
    guidance_rescale: Fraction = Field(
        default=0.0,
        description="how far the guided prediction is scaled back to the std of the one with the prompt; "
        "against overexposure by strong guidance",
    )
    control_guidance_start: Fraction | Fractions = Field(
        default=0.0,
        description="fraction of the steps at which the ControlNet starts; a list gives one value per "
        "ControlNet",
    )
    control_guidance_end: Fraction | Fractions = Field(
        default=1.0,
        description="fraction of the steps at which the ControlNet ends; a list gives one value per "
        "ControlNet",
    )
    context_scale: Annotated[float, Field(ge=0, le=10)] = Field(
        default=1.0, description="weight of all contexts relative to the prompt"
    )
    context_blocks: Annotated[str | dict[str, Any], AfterValidator(_checked_blocks)] = Field(
        default="all",
        description="the U-Net's blocks that attend to the contexts: all, style, layout, style+layout, or "
        "diffusers' mapping of scales by block, times `context_scale`",
    )
    context_weights: list[Annotated[float, Field(ge=0, le=10)]] | None = Field(
        default=None, description="one weight per context; default: 1 for each"
    )
    lora: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="a name of `model.loras`; default: none of them"
    )
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = Field(
        default=1.0,
        description="the scale of the row's LoRA; rows share calls where LoRA and scale are equal",
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
    def _windows_are_open(self) -> Self:
        for start, end in self.control_windows(None):
            if start >= end:
                raise ValueError(
                    f"control_guidance_start ({start:g}) must be below control_guidance_end ({end:g})"
                )
        return self

    def by_controlnet(self, name: str, networks: int) -> list[float]:
        """Return the value of a control setting for each of so many ControlNets. Raises ValueError where its
        list has another length."""
        value = getattr(self, name)
        values: list[float] = value if isinstance(value, list) else [value] * networks
        if len(values) != networks:
            raise ValueError(f"{name}: {len(values)} values for {networks} ControlNets")
        return values

    def control_windows(self, networks: int | None) -> list[tuple[float, float]]:
        """Return the start and the end of each ControlNet's window. networks: how many there are; None: as
        many as the lists say. Raises ValueError where the lists say another number."""
        names = ("control_guidance_start", "control_guidance_end")
        if networks is None:
            given = (getattr(self, name) for name in names)
            networks = max(len(value) if isinstance(value, list) else 1 for value in given)
        starts, ends = (self.by_controlnet(name, networks) for name in names)
        return list(zip(starts, ends, strict=True))


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
    "ip_adapter_masks": "context_masks",
    "cfg_rescale": "guidance_rescale",
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
