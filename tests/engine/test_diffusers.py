"""A row of any mixed batch is the picture that diffusers' own pipeline makes of that row alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_samplers import REFERENCES
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from context_diffusion.config import Settings
from context_diffusion.control import controls_of
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.schema import Pixels, Request, Result
from tiny import picture
from tiny_diffusers import SIDE, make_base, make_controlnet, make_image_encoder, make_ip_adapter

Model = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """-> the `model:` mapping of a kind: (xl, plus)."""

    @cache
    def make(xl: bool, plus: bool) -> Model:
        folder = tmp_path_factory.mktemp("sd")
        base = make_base(folder, xl)
        encoder = make_image_encoder(folder)
        nets = [make_controlnet(folder, xl, seed) for seed in (1, 2)]
        return {"base": base, "controlnet": nets, "image_encoder": encoder, **make_ip_adapter(folder, base, plus, xl)}

    return make


def row(number: int, **own: Any) -> Request:
    contexts, size, kinds = own.pop("contexts", 1), own.pop("size", (SIDE, SIDE)), own.pop("control", ["canny", "gray"])
    prompt, negative = own.pop("prompt", "a misty forest"), own.pop("negative_prompt", None)
    settings = Settings.model_validate({"seed": number, "num_inference_steps": 3, "guidance_scale": 4.0, **own})
    query = picture(number, *size)
    shown = tuple(picture(100 + number + k, 32, 32) for k in range(contexts))
    return Request(f"row-{number}", 0, query, controls_of(query, kinds), shown, prompt, negative, settings)


def reference(
    model: Model, one: Request, xl: bool, contexts: list[Image.Image] | None = None, skip: int | None = None
) -> tuple[torch.Tensor, Pixels]:
    """By diffusers alone: its pipeline for that kind of row, its scheduler, one call. contexts: the originals, of any size,
    in place of the request's pixels; skip: clip_skip. -> latents and picture."""
    settings = one.settings
    pipe = pipeline_of(json.dumps(model), xl, bool(one.controls), settings.strength is not None)
    if "ip_adapter" in model:
        pipe.set_ip_adapter_scale(settings.context_scale)
    name, own = REFERENCES[settings.scheduler]
    pipe.scheduler = getattr(diffusers, name).from_pretrained(model["base"], subfolder="scheduler", **own)
    told: dict[str, Any] = {"prompt": one.prompt or "", "negative_prompt": one.negative_prompt}
    told |= {"clip_skip": skip} if skip else {}
    if xl and one.prompt is None and one.negative_prompt is None:  # no text at all: what the pipeline has for it
        told = {"prompt_embeds": torch.zeros(1, 77, 64), "pooled_prompt_embeds": torch.zeros(1, 32)}
    if "ip_adapter" in model:
        told["ip_adapter_image"] = [contexts or [Image.fromarray(context) for context in one.contexts]]
    maps = [Image.fromarray(control.pixels) for control in one.controls]
    if one.controls:
        told |= {"control_guidance_start": settings.control_guidance_start, "control_guidance_end": settings.control_guidance_end}
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
    with torch.inference_mode():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, np.asarray(pipe.image_processor.postprocess(decoded, output_type="pil")[0])


@cache
def pipeline_of(parts: str, xl: bool, controlled: bool, from_image: bool) -> Any:
    model: Model = json.loads(parts)
    name = "StableDiffusion" + ("XL" if xl else "") + ("ControlNet" if controlled else "") + ("Img2Img" if from_image else "")
    nets = [diffusers.ControlNetModel.from_pretrained(net) for net in model["controlnet"]] if controlled else []
    own = {"controlnet": nets} if nets else {}
    pipe = getattr(diffusers, f"{name}Pipeline").from_pretrained(model["base"], use_safetensors=True, **own)
    if "ip_adapter" in model:
        pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(model["image_encoder"])
        pipe.feature_extractor = preprocessor(model["image_encoder"])
        pipe.load_ip_adapter(model["ip_adapter"], "", model["ip_adapter_weight_name"], image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preprocessor(encoder: str) -> CLIPImageProcessor:
    """The encoder's own, as a user of diffusers loads it; without one what the pipeline makes for an encoder of 32 pixels."""
    if (Path(encoder) / "preprocessor_config.json").exists():
        return CLIPImageProcessor.from_pretrained(encoder)
    return CLIPImageProcessor(size=32, crop_size=32)


def made(model: Model, rows: list[Request]) -> dict[str, tuple[torch.Tensor, Pixels]]:
    """By our engine, all rows together."""
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    kept, decode = {}, pipeline.backbone.decode
    pipeline.backbone.decode = lambda z, one, *told: kept.setdefault(one.id, z) is z and decode(z, one, *told)  # type: ignore[method-assign]
    found = {}
    for one, outcome in pipeline.generate(rows):
        assert isinstance(outcome, Result), outcome
        found[one.id] = kept[one.id], outcome.image
    return found


def compare(model: Model, rows: list[Request], xl: bool) -> None:
    ours = made(model, rows)
    for one in rows:
        latents, image = reference(model, one, xl)
        mine, pixels = ours[one.id]
        assert (mine - latents).abs().max() <= 1e-4 * max(1.0, float(latents.abs().max())), one.id
        assert np.abs(pixels.astype(int) - image.astype(int)).max() <= 1, one.id
        assert len(np.unique(pixels)) > 30, "a picture that says something"


MIXED: list[dict[str, Any]] = [
    {"contexts": 1, "num_inference_steps": 4, "scheduler": "euler"},
    {"contexts": 3, "prompt": "a red house by the sea", "guidance_scale": 1.0, "scheduler": "dpmpp_2m"},
    {"contexts": 2, "prompt": None, "context_scale": 0.4, "num_inference_steps": 5, "controlnet_conditioning_scale": [0.3, 0.9]},
    {"contexts": 4, "negative_prompt": "blurry", "control_guidance_end": 0.6, "num_inference_steps": 6, "scheduler": "euler_a"},
    {"contexts": 1, "control_guidance_start": 0.4, "num_inference_steps": 5, "scheduler": "ddpm", "context_scale": 0.0},
    {"contexts": 2, "strength": 0.6, "num_inference_steps": 6, "scheduler": "dpmpp_2m_karras", "size": (64, 96)},
    {"contexts": 1, "scheduler": "lcm", "guidance_scale": 0.0, "negative_prompt": "ugly"},
    {"contexts": 2, "scheduler": "dpmpp_sde", "num_inference_steps": 5, "guidance_scale": 9.0, "size": (96, 64)},
    {"contexts": 1, "scheduler": "ddim", "strength": 0.5, "num_inference_steps": 4, "prompt": "words " * 20},
]


SLOW = pytest.mark.slow  # `make test` has one kind of each, `make test-full` the others
KINDS = [(False, False), pytest.param(False, True, marks=SLOW), pytest.param(True, False, marks=SLOW), (True, True)]


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_each_row_of_a_mixed_batch_is_what_diffusers_makes_of_it_alone(models: Any, xl: bool, plus: bool) -> None:
    compare(models(xl, plus), [row(number, **own) for number, own in enumerate(MIXED)], xl)


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=SLOW)])
def test_without_controlnet_and_without_ip_adapter_too(models: Any, xl: bool) -> None:
    model = models(xl, False)
    rows = [row(n, control=[], scheduler=name) for n, name in enumerate(("ddim", "euler", "dpmpp_2m"))]
    rows.append(row(9, control=[], strength=0.7, num_inference_steps=4))
    compare(model, rows, xl)
    plain = {name: part for name, part in model.items() if "ip_adapter" not in name and name != "image_encoder"}
    compare(plain, [row(5), row(6, control=[], guidance_scale=1.0)], xl)


CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "0"},
    "negative prompt": {"negative_prompt": "~ dull, grey and blurred ~ ~ ~"},
    "contexts": {"contexts": 3},
    "steps": {"num_inference_steps": 2},
    "scheduler": {"scheduler": "euler_a"},
    "guidance": {"guidance_scale": 12.0},
    "control map": {"control": ["none", "soft_edges"]},
    "control scale": {"controlnet_conditioning_scale": [0.0, 1.0]},
    "control window": {"control_guidance_end": 0.4},
    "context scale": {"context_scale": 0.1},
    "seed": {"seed": 77},
    "strength": {"strength": 0.6},
}


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=SLOW)])
def test_each_input_moves_the_reference_itself(models: Any, xl: bool) -> None:
    """Else a model that ignores an input could pass."""
    model = models(xl, True)
    base = reference(model, row(1), xl)[1].astype(int)
    still = [what for what, change in CHANGES.items() if np.abs(reference(model, row(1, **change), xl)[1] - base).max() < 20]
    assert not still
