"""A row with union ControlNets by diffusers alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from PIL import Image
from torch import nn
from transformers import CLIPVisionModelWithProjection

from context_diffusion.core.records import Pixels, Request
from support.diffusers_reference import REFERENCES, Model, image_of, preprocessor

# Written once more, apart from the package: the list in ControlNetPlus' README.
MODES = {
    "openpose": 0,
    "depth": 1,
    "soft_edges": 2,
    "canny": 3,
    "lineart": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
}


class AsPlain(nn.Module):
    """A union ControlNet with one control type, as diffusers' MultiControlNetModel calls its networks: it has
    no pipeline for a union ControlNet beside a plain one."""

    def __init__(self, union: Any) -> None:
        super().__init__()
        self.union, self.mode, self.config = union, 0, union.config

    def forward(self, controlnet_cond: torch.Tensor, sample: torch.Tensor, **told: Any) -> Any:
        types = torch.zeros(len(sample), self.union.config.num_control_type)
        types[:, self.mode] = 1
        told |= {"controlnet_cond": [controlnet_cond], "control_type": types, "control_type_idx": [self.mode]}
        return self.union(sample=sample, **told)


@cache
def union_pipeline(
    base: str, nets: tuple[str, ...], plain: tuple[str, ...], adapter: tuple[str, ...], name: str
) -> Any:
    loaded = [
        (ControlNetModel if net in plain else ControlNetUnionModel).from_pretrained(net) for net in nets
    ]
    controlnet: Any = loaded[0] if len(loaded) == 1 else loaded
    if plain:
        wrapped = [net if isinstance(net, ControlNetModel) else AsPlain(net) for net in loaded]
        controlnet = diffusers.MultiControlNetModel(wrapped)
    pipe = getattr(diffusers, name).from_pretrained(base, controlnet=controlnet, use_safetensors=True)
    if adapter:
        encoder, folder, file = adapter
        pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(encoder)
        pipe.feature_extractor = preprocessor(encoder)
        pipe.load_ip_adapter(folder, "", file, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def union_reference(model: Model, one: Request, plain: tuple[str, ...] = ()) -> Pixels:
    """By StableDiffusionXLControlNetUnionPipeline and its like. plain: those of the ControlNets that are
    none of a union."""
    settings = one.settings
    parts = ("image_encoder", "ip_adapter", "ip_adapter_weight_name")
    adapter = tuple(model[part] for part in parts) if "ip_adapter" in model else ()
    name = "StableDiffusionXLControlNet" + ("" if plain else "Union")
    name += "Pipeline" if settings.strength is None else "Img2ImgPipeline"
    pipe = union_pipeline(model["base"], tuple(model["controlnet"]), plain, adapter, name)
    scheduler, own = REFERENCES[settings.scheduler]
    pipe.scheduler = getattr(diffusers, scheduler).from_pretrained(
        model["base"], subfolder="scheduler", **own
    )
    maps = [Image.fromarray(control.given) for control in one.controls]
    modes = [MODES.get(control.kind, 0) for control in one.controls]
    told: dict[str, Any] = {"image" if plain and settings.strength is None else "control_image": maps}
    if plain:
        for net, mode in zip(pipe.controlnet.nets, modes, strict=True):
            net.mode = mode
    else:
        told["control_mode"] = modes
    if settings.strength is not None:
        told |= {"image": Image.fromarray(one.query), "strength": settings.strength}
    if adapter:
        pipe.set_ip_adapter_scale(settings.context_scale)
        told["ip_adapter_image"] = [[Image.fromarray(context) for context in one.contexts]]
    scale = settings.controlnet_conditioning_scale
    latents = pipe(
        prompt=one.prompt or "",
        negative_prompt=one.negative_prompt,
        controlnet_conditioning_scale=scale if isinstance(scale, list) else [scale] * len(maps),
        control_guidance_start=settings.control_guidance_start,
        control_guidance_end=settings.control_guidance_end,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(settings.seed or 0),
        output_type="latent",
        **told,
    ).images
    return image_of(pipe, latents)
