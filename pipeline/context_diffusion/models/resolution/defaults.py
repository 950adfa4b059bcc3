"""A model's own defaults: its published settings and its ControlNets' control maps. Knows no torch.

Sources: the model cards of stable-diffusion-xl-base-1.0 (40 steps), control_v11p_sd15_canny (30 steps of a
multistep solver), controlnet-canny-sdxl-1.0 (scale .5); the defaults of diffusers' pipelines (guidance 7.5
and 5); IP-Adapter's README (a scale about .5 beside a prompt, its notebooks .6); the cards of
FLUX.2-klein-4B (4 steps, guidance 1) and FLUX.2-klein-base-4B (50 steps, guidance 4); diffusers' pipeline of
latent consistency models (4 steps, guidance 8.5); the cards of lcm-sdxl (guidance 8), lcm-lora-sdv1-5,
lcm-lora-sdxl, SDXL-Lightning and Hyper-SD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob, control_kinds
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.records import no_map
from context_diffusion.core.schema import CONTROL_SETTINGS
from context_diffusion.core.settings import (
    FLOW_SCHEDULERS,
    SchedulerName,
    Settings,
    did_you_mean,
    suitable_schedulers,
)
from context_diffusion.core.sweep import combinations
from context_diffusion.inputs.control_maps import CONTROLS
from context_diffusion.models.resolution.context_blocks import ContextBlocks, context_blocks
from context_diffusion.models.resolution.controlnets import CONTROLNETS
from context_diffusion.models.resolution.few_steps import FewSteps

SD15: dict[str, Any] = {
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "scheduler": "dpmpp_2m",
    "context_scale": 0.6,
}
SDXL: dict[str, Any] = {
    "num_inference_steps": 40,
    "guidance_scale": 5.0,
    "scheduler": "euler",
    "context_scale": 0.6,
}
# U-Nets that were distilled to a latent consistency model, which reads the guidance scale as a number.
LCM: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 8.5, "scheduler": "lcm"}
LCM_SDXL = LCM | {"guidance_scale": 8.0}
KLEIN: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
KLEIN_BASE: dict[str, Any] = {"num_inference_steps": 50, "guidance_scale": 4.0}
FLUX2_SCHEDULER: SchedulerName = "flow_euler"
CONTEXT_SLOTS = 8  # contexts that a row of Stable Diffusion may have
FLUX2_CONTEXTS = 3  # the model takes four references, of which the query is one
STABLE_DIFFUSION_ONLY: dict[str, Any] = {"context_blocks": "all", "lora": None, "lora_scale": 1.0}
FLUX2_UNUSED: dict[str, Any] = {
    "strength": None,
    "context_guidance_scale": None,
    "guidance_rescale": 0.0,
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    **STABLE_DIFFUSION_ONLY,
}
NATIVE_SETTINGS: dict[str, Any] = {"num_inference_steps": 4}  # most of the image is its draft
# A base's own scheduler, by its class in diffusers.
SCHEDULERS: dict[str, SchedulerName] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",  # of its other algorithms: see _own_scheduler
    "TCDScheduler": "tcd",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}
MULTISTEP = "dpmsolver++"  # the algorithm of dpmpp_2m, and the default of its class


@dataclass(frozen=True)
class Defaults:
    """The defaults of a model.

    settings: row settings by name. control: a map for each ControlNet; None: it is unknown what they were
    trained on; empty: the model has none. controlnets: their names, for messages. family: the kind of model,
    for messages. unused: settings that the model has no use for, with the value that means so. schedulers:
    those that go with what it predicts. blocks: of its U-Net, for `context_blocks`. loras: the names that the
    setting `lora` may have. control_types: the kinds of maps that each ControlNet takes; None: any.
    estimates_depth: the model has a depth estimator. context_slots: contexts that a row may have; None: any
    number. reads_query: as a reference, in place of a ControlNet."""

    settings: dict[str, Any] = field(default_factory=dict)
    control: tuple[str, ...] | None = ("gray",)
    controlnets: tuple[str, ...] = ("its own",)
    family: str = ""
    unused: Mapping[str, Any] = field(default_factory=dict)
    schedulers: tuple[SchedulerName, ...] = suitable_schedulers({})
    blocks: ContextBlocks | None = None
    loras: tuple[str, ...] = ()
    control_types: tuple[tuple[str, ...] | None, ...] = ()
    estimates_depth: bool = False
    context_slots: int | None = None
    reads_query: bool = False

    @property
    def takes_masks(self) -> bool:
        """Whether contexts may have masks: those of an IP-Adapter, which attends in blocks of the U-Net."""
        return self.blocks is not None

    def no_map(self, kinds: Sequence[str]) -> str | None:
        """Return why rows must bring their control maps, for the first kind that neither this package nor the
        model computes; None where all are computed."""
        computed = {*CONTROLS, *(["depth"] if self.estimates_depth else [])}
        return next((no_map(kind) for kind in kinds if kind not in computed), None)

    def refusal(self, settings: Settings) -> str | None:
        """Return why the model does not take the settings; None where it does."""
        if settings.scheduler not in self.schedulers:
            known = ", ".join(self.schedulers)
            return f"scheduler: {settings.scheduler} does not suit {self.family}; choose {known}"
        for name, neutral in self.unused.items():
            value = getattr(settings, name)
            if name == "context_guidance_scale" and value == settings.guidance_scale:
                continue  # as OUTPUT has it for a row without one
            if name == "guidance_scale" and value < neutral:
                continue
            if value not in (neutral, [neutral]):
                return f"{name}: {self.family} has no use for it, got {value}; leave it out"
        if self.blocks:
            try:
                self.blocks.scales(settings.context_blocks)
            except ValueError as error:
                return f"context_blocks: {error}"
        if settings.lora is not None and settings.lora not in self.loras:
            known = did_you_mean(settings.lora, self.loras) if self.loras else "the model has none"
            return f"lora: {settings.lora!r} is not a name of model.loras; {known}"
        return None


def native_defaults(context_slots: int | None = None) -> Defaults:
    """Return the defaults of a native model."""
    return Defaults(
        NATIVE_SETTINGS,
        family="a native model",
        unused=STABLE_DIFFUSION_ONLY,
        context_slots=context_slots,
    )


def stable_diffusion_defaults(
    parts: Parts,
    unet: Mapping[str, Any],
    xl: bool,
    scheduler: Mapping[str, Any],
    few_steps: FewSteps | None = None,
) -> Defaults:
    """Return the defaults of a base with its parts.

    unet, scheduler: the base's configurations. few_steps: the LoRA for few steps, whose settings replace the
    base's."""
    settings = SDXL if xl else SD15
    if unet.get("time_cond_proj_dim"):  # a latent consistency model
        settings = settings | (LCM_SDXL if xl else LCM)
    if name := _own_scheduler(scheduler):
        settings = settings | {"scheduler": name}
    if few_steps:
        settings = settings | few_steps.settings
    known = [CONTROLNETS.get(net) for net in parts.controlnets]
    scales = [net[1] if net else 1.0 for net in known]
    if set(scales) > {1.0} or (scales and scales[0] != 1.0):
        settings = settings | {"controlnet_conditioning_scale": scales}
    control = None if None in known else tuple(net[0] for net in known if net)
    adapted = parts.ip_adapter is not None
    return Defaults(
        settings,
        control,
        tuple(parts.controlnets),
        family="a Stable Diffusion" if adapted else "a Stable Diffusion without IP-Adapter",
        unused={} if adapted else {"context_blocks": "all"},
        schedulers=suitable_schedulers(scheduler),
        blocks=context_blocks(unet, xl) if adapted else None,
        loras=tuple(parts.loras),
        context_slots=CONTEXT_SLOTS,
    )


def _own_scheduler(config: Mapping[str, Any]) -> SchedulerName | None:
    """Return the scheduler of a base's scheduler_config; None: no name here stands for it."""
    algorithm = config.get("algorithm_type", MULTISTEP)
    if config.get("_class_name") == "DPMSolverMultistepScheduler" and algorithm != MULTISTEP:
        return "dpmpp_sde" if algorithm == f"sde-{MULTISTEP}" else None
    return SCHEDULERS.get(str(config.get("_class_name")))


def flux2_defaults(distilled: bool) -> Defaults:
    """Return the defaults of a FLUX.2 [klein], which has no ControlNet."""
    settings = KLEIN if distilled else KLEIN_BASE
    family, unused = "a FLUX.2 [klein]", FLUX2_UNUSED
    if distilled:
        family, unused = "a distilled FLUX.2 [klein]", FLUX2_UNUSED | {"guidance_scale": 1.0}
    return Defaults(
        settings | {"scheduler": FLUX2_SCHEDULER},
        (),
        (),
        family,
        unused,
        FLOW_SCHEDULERS,
        context_slots=FLUX2_CONTEXTS,
        reads_query=True,
    )


def resolved_settings(defaults: Defaults, given: Settings) -> Settings:
    """Return the given settings, completed by the model's defaults, then by those of Settings. Raises
    ConfigError for a setting that the model has no use for."""
    settings = Settings.model_validate(defaults.settings | given.model_dump(include=given.model_fields_set))
    if reason := defaults.refusal(settings):
        raise ConfigError(f"settings.{reason}")
    return settings


def resolved_control(defaults: Defaults, given: str | Sequence[str] | None) -> list[str]:
    """Return the control map of each ControlNet, [] if none runs. Raises ConfigError if it is unknown or does
    not fit."""
    if given is None:
        if defaults.control is None:
            names = ", ".join(defaults.controlnets)
            typed = zip(defaults.controlnets, defaults.control_types, strict=False)
            unions = "".join(f"; {name} takes {', '.join(types)}" for name, types in typed if types)
            raise ConfigError(
                f"control: the map that the ControlNet {names} was trained on is unknown; "
                "set control to canny, gray, soft_edges, tile, depth or none (the query itself), a list for "
                f"several, or to disabled{unions}"
            )
        return list(defaults.control)
    kinds = control_kinds(given)
    if kinds and defaults.reads_query:
        raise ConfigError(
            f"control: {'+'.join(kinds)}: {defaults.family} has no ControlNet, it reads the query itself; "
            "leave control out"
        )
    if kinds and len(kinds) != len(defaults.controlnets):
        count = len(defaults.controlnets)
        raise ConfigError(
            f"control: {len(kinds)} map(s) ({', '.join(kinds)}) for a model with {count} ControlNet(s); "
            "name one for each, or disabled"
        )
    for kind, name, types in zip(kinds, defaults.controlnets, defaults.control_types, strict=False):
        if types is not None and kind not in types:
            raise ConfigError(
                f"control: {kind} is not a control type of the union ControlNet {name}, which takes "
                f"{', '.join(types)}"
            )
    return kinds


def refusal(defaults: Defaults, networks: int, settings: Settings) -> str | None:
    """Return why a model does not take the settings where so many of its ControlNets run; None where it
    does."""
    for name in CONTROL_SETTINGS if networks else ():
        try:
            settings.by_controlnet(name, networks)
        except ValueError as error:
            return str(error)
    return defaults.refusal(settings)


def resolved_job(job: GenerateJob, defaults: Defaults) -> GenerateJob:
    """Return the job with what it leaves out taken from its model's defaults. Raises ConfigError."""
    kinds = resolved_control(defaults, job.control)
    settings = resolved_settings(defaults, job.settings)
    if reason := refusal(defaults, len(kinds), settings):
        raise ConfigError(f"settings.{reason}")
    for combination in combinations(job.matrix):
        if reason := refusal(defaults, len(kinds), settings.model_copy(update=combination)):
            raise ConfigError(f"matrix: {reason}")
    return job.model_copy(update={"control": kinds or "disabled", "settings": settings})
