"""The same row by diffusers alone, and the comparison with ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.core.settings import SchedulerName, Settings
from context_diffusion.engine.backbone import Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.pipeline import ContextDiffusion
from support.tiny import picture
from support.tiny_diffusers import SIDE

Model = dict[str, Any]


def row(number: int, **own: Any) -> Request:
    contexts, size, kinds = (
        own.pop("contexts", 1),
        own.pop("size", (SIDE, SIDE)),
        own.pop("control", ["canny", "gray"]),
    )
    prompt, negative = own.pop("prompt", "a misty forest"), own.pop("negative_prompt", None)
    masks = own.pop("masks", ())
    settings = Settings.model_validate(
        {"seed": number, "num_inference_steps": 3, "guidance_scale": 4.0, **own}
    )
    query = picture(number, *size)
    shown = tuple(picture(100 + number + k, 32, 32) for k in range(contexts))
    controls = controls_of(query, kinds)
    return Request(f"row-{number}", 0, query, controls, shown, prompt, negative, settings, masks=masks)


def reference(
    model: Model, one: Request, xl: bool, contexts: list[Image.Image] | None = None, skip: int | None = None
) -> tuple[torch.Tensor, Pixels]:
    """By diffusers alone: its pipeline for that kind of row, its scheduler, one call. contexts: the
    originals, of any size, in place of the request's pixels; skip: clip_skip. -> latents and picture."""
    settings = one.settings
    lora = None if settings.lora is None else model["loras"][settings.lora]
    pipe = pipeline_of(json.dumps(model), xl, bool(one.controls), settings.strength is not None, lora)
    if lora:
        pipe.set_adapters(["own"], [settings.lora_scale])
    if "ip_adapter" in model:
        pipe.set_ip_adapter_scale(adapter_scale(one, xl))
    name, own = REFERENCES[settings.scheduler]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(
        model.get("config", model["base"]), subfolder="scheduler", **own
    )
    told: dict[str, Any] = {"prompt": one.prompt or "", "negative_prompt": one.negative_prompt}
    told |= {"clip_skip": skip} if skip else {}
    if (
        xl and one.prompt is None and one.negative_prompt is None
    ):  # no text at all: what the pipeline has for it
        told = {"prompt_embeds": torch.zeros(1, 77, 64), "pooled_prompt_embeds": torch.zeros(1, 32)}
    if "ip_adapter" in model:
        told["ip_adapter_image"] = [contexts or [Image.fromarray(context) for context in one.contexts]]
    if one.masks:
        width, height = one.output_size
        masks = IPAdapterMaskProcessor().preprocess(
            [Image.fromarray(mask).convert("L") for mask in one.masks], height=height, width=width
        )
        told["cross_attention_kwargs"] = {"ip_adapter_masks": [masks.reshape(1, -1, height, width)]}
    if settings.guidance_rescale:
        told["guidance_rescale"] = settings.guidance_rescale
    told |= {"eta": 0.3} if settings.scheduler == "tcd" else {}  # its class's default; the pipelines' is 0
    maps = [Image.fromarray(control.pixels) for control in one.controls]
    if one.controls:
        told |= {
            "control_guidance_start": settings.control_guidance_start,
            "control_guidance_end": settings.control_guidance_end,
        }
        scale = settings.controlnet_conditioning_scale
        told["controlnet_conditioning_scale"] = scale if isinstance(scale, list) else [scale] * len(maps)
    if settings.strength is not None:
        told |= {"image": Image.fromarray(one.query), "strength": settings.strength}
        told |= {"control_image": maps} if maps else {}
    else:
        height, width = one.query.shape[:2]
        told |= {"image": maps} if maps else {"height": height, "width": width}
    latents = pipe(
        **told,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(settings.seed or 0),
        output_type="latent",
    ).images
    return latents, image_of(pipe, latents)


def image_of(pipe: Any, latents: torch.Tensor) -> Pixels:
    """What a pipeline decodes latents to."""
    config = pipe.vae.config
    scaled = latents / config.scaling_factor
    if "XL" in type(pipe).__name__ and config.latents_mean and config.latents_std:
        mean, std = (torch.tensor(part)[:, None, None] for part in (config.latents_mean, config.latents_std))
        scaled = scaled * std + mean
    with torch.inference_mode():
        decoded = pipe.vae.decode(scaled).sample
    return np.asarray(pipe.image_processor.postprocess(decoded, output_type="pil")[0])


# Written once more, apart from the package: the blocks that InstantStyle names.
STYLE = {True: {"up": {"block_0": [0.0, 1.0, 0.0]}}, False: {"up": {"block_1": 1.0}}}
LAYOUT = {True: {"down": {"block_2": [0.0, 1.0]}}, False: {"down": {"block_2": 1.0}, "mid": 1.0}}


def adapter_scale(one: Request, xl: bool) -> list[Any]:
    """What a user of diffusers gives to set_ip_adapter_scale. The tests' weights of masked contexts differ
    only where all blocks act."""
    scale, blocks = one.settings.context_scale, one.settings.context_blocks
    if one.masks and one.settings.context_weights:
        return [[scale * weight for weight in one.settings.context_weights]]
    if blocks == "all":
        return [scale]
    if isinstance(blocks, str):
        blocks = {
            "style": STYLE[xl],
            "layout": LAYOUT[xl],
            "style+layout": {**STYLE[xl], **LAYOUT[xl]},
        }[blocks]
    return [times(blocks, scale)]


def times(scales: Any, factor: float) -> Any:
    if isinstance(scales, dict):
        return {name: times(own, factor) for name, own in scales.items()}
    return [times(own, factor) for own in scales] if isinstance(scales, list) else scales * factor


@cache
def pipeline_of(parts: str, xl: bool, controlled: bool, from_image: bool, lora: str | None = None) -> Any:
    model: Model = json.loads(parts)
    name = (
        "StableDiffusion"
        + ("XL" if xl else "")
        + ("ControlNet" if controlled else "")
        + ("Img2Img" if from_image else "")
    )
    nets = (
        [diffusers.ControlNetModel.from_pretrained(net) for net in model["controlnet"]] if controlled else []
    )
    own = {"controlnet": nets} if nets else {}
    kind = getattr(diffusers, f"{name}Pipeline")
    if "config" in model:
        pipe = kind.from_single_file(model["base"], config=model["config"], local_files_only=True, **own)
    else:
        pipe = kind.from_pretrained(model["base"], use_safetensors=True, **own)
    if "lora" in model:
        pipe.load_lora_weights(model["lora"])
    if "ip_adapter" in model:
        pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(model["image_encoder"])
        pipe.feature_extractor = preprocessor(model["image_encoder"])
        pipe.load_ip_adapter(
            model["ip_adapter"], "", model["ip_adapter_weight_name"], image_encoder_folder=None
        )
    if lora:
        pipe.load_lora_weights(lora, adapter_name="own")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preprocessor(encoder: str) -> CLIPImageProcessor:
    """The encoder's own, as a user of diffusers loads it; without one what the pipeline makes for an encoder
    of 32 pixels."""
    if (Path(encoder) / "preprocessor_config.json").exists():
        return CLIPImageProcessor.from_pretrained(encoder)
    return CLIPImageProcessor(size=32, crop_size=32)


def made(model: Model, rows: list[Request]) -> dict[str, tuple[torch.Tensor, Pixels]]:
    """By our engine, all rows together."""
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    found = {}
    with watch_latents(pipeline.backbone) as latents:
        for row, outcome in pipeline.generate(rows):
            assert isinstance(outcome, Result), outcome
            found[row.id] = latents[row.id], outcome.image
    return found


@contextmanager
def watch_latents(backbone: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the final latents of each row, by its id, of an engine with one thread."""
    encode, decode = backbone.encode, backbone.decode
    latents: dict[str, torch.Tensor] = {}
    decoded: list[torch.Tensor] = []

    def watched_decode(sample: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        decoded.append(sample)
        return decode(sample, tiled)

    def watched_encode(row: Request, branches: list[Branch], cache: Cache) -> Encoded:
        def finish(image: torch.Tensor) -> torch.Tensor:
            latents[row.id] = decoded[-1]
            return image

        return replace(encode(row, branches, cache), finish=finish)

    backbone.encode, backbone.decode = watched_encode, watched_decode
    try:
        yield latents
    finally:
        backbone.encode, backbone.decode = encode, decode


def compare(model: Model, rows: list[Request], xl: bool) -> None:
    ours = made(model, rows)
    for one in rows:
        latents, image = reference(model, one, xl)
        mine, pixels = ours[one.id]
        assert (mine - latents).abs().max() <= 1e-4 * max(1.0, float(latents.abs().max())), one.id
        assert np.abs(pixels.astype(int) - image.astype(int)).max() <= 1, one.id
        assert len(np.unique(pixels)) > 30, "a picture that says something"


# Written once more, apart from the package: what a diffusers user would construct.
REFERENCES: dict[SchedulerName, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "tcd": ("TCDScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
