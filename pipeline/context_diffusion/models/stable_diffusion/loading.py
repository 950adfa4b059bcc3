"""Load a pretrained Stable Diffusion (1.x, 2.x, XL) from its parts, by diffusers' own loaders.

Reads safetensors only, runs no remote code. Knows no rows and no steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.lora import fuse_loras
from context_diffusion.models.resolution.hub import fetch
from context_diffusion.models.stable_diffusion.control_networks import load_controlnets
from context_diffusion.models.stable_diffusion.depth_maps import DepthEstimator, load_depth_estimator
from context_diffusion.models.stable_diffusion.row_loras import load_row_loras
from context_diffusion.models.stable_diffusion.safety_checker import SafetyChecker

# IP-Adapters that read images
ADAPTERS = (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)


@dataclass
class StableDiffusion:
    """A loaded model. pipe: diffusers' text-to-image pipeline of the base, with the IP-Adapter in its U-Net;
    xl: an XL one. row_loras: copies of it with each LoRA that rows choose, by name."""

    pipe: Any
    controlnets: list[Any]
    parts: Parts
    xl: bool
    row_loras: dict[str, Any]
    unsafe: SafetyChecker | None = None
    depth: DepthEstimator | None = None


def load(parts: Parts, device: torch.device) -> StableDiffusion:
    """Load all parts on the device, in the dtype that the parts name. Raises ModelError naming the part."""
    loader = ComponentLoader(parts, device)
    xl = "StableDiffusionXL" in fetch(parts.configuration, "model_index.json", parts.revision).read_text()
    kind_of_pipe = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    # The safety checker is loaded apart: the pipeline is never called, and XL's takes none.
    components: dict[str, Any] = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    if parts.image_encoder:
        components["image_encoder"] = loader(transformers.CLIPVisionModelWithProjection, parts.image_encoder)
    if parts.vae:
        components["vae"] = loader.component(diffusers.AutoencoderKL, parts.vae)
    pipe = loader.base(kind_of_pipe, **components)
    _check_text(pipe, parts.base, xl)
    controlnets = load_controlnets(loader, parts.controlnets, pipe.unet)
    fuse_loras(pipe, parts, "unet.")
    row_loras = load_row_loras(pipe, parts)
    if parts.ip_adapter and parts.ip_adapter_weight_name:
        _load_ip_adapter(pipe, parts, fetch(parts.ip_adapter, parts.ip_adapter_weight_name, parts.revision))
    pipe.set_progress_bar_config(disable=True)
    checker = _load_safety_checker(loader, parts.safety_checker) if parts.safety_checker else None
    copied = [module for copy in row_loras.values() for module in copy.components.values()]
    for module in [*pipe.components.values(), *copied, *controlnets, checker]:
        if isinstance(module, nn.Module):
            module.to(device).eval().requires_grad_(False)
    pipe.vae.to(_vae_dtype(loader.dtype, device, upcast=xl and pipe.vae.config.force_upcast))
    depth = load_depth_estimator(loader, parts.depth_estimator, device) if parts.depth_estimator else None
    unsafe = SafetyChecker(checker) if checker else None
    return StableDiffusion(pipe, controlnets, parts, xl, row_loras, unsafe, depth)


def _check_text(pipe: Any, base: str, xl: bool) -> None:
    """Raise ModelError where the base's tokenizers, text encoders and U-Net do not go together: its rows
    would all fail."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if xl else [pipe.text_encoder]
    tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if xl else [pipe.tokenizer]
    for number, (tokenizer, encoder) in enumerate(zip(tokenizers, encoders, strict=True), 1):
        length = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > length:  # transformers makes an empty one where a folder is missing
            name = "tokenizer" if number == 1 else f"tokenizer_{number}"
            raise ModelError(
                f"model: the {name} of {base} gives more than the {length} tokens that its text encoder "
                f"reads: download its {name}/ again"
            )
    width, read = (
        sum(encoder.config.hidden_size for encoder in encoders),
        pipe.unet.config.cross_attention_dim,
    )
    if isinstance(read, int) and read != width:
        raise ModelError(
            f"model: the U-Net of {base} reads text of width {read}, its text encoders give {width}"
        )


def _vae_dtype(dtype: torch.dtype, device: torch.device, upcast: bool) -> torch.dtype:
    """Return the autoencoder's dtype beside networks of a dtype, to encode and decode.

    bfloat16 is noisier than float16 in pixels. upcast: it overflows in float16, as diffusers' XL pipelines
    know too."""
    if dtype == torch.float32 or upcast:
        return torch.float32
    return torch.float16 if device.type == "cuda" else dtype


def _load_safety_checker(loader: ComponentLoader, part: str) -> Any:
    checker, info = loader(StableDiffusionSafetyChecker, part, output_loading_info=True)
    if info["missing_keys"]:  # transformers would use random ones
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"model: safety_checker {part} is not a safety checker: {len(missing)} weights are missing, "
            f"{', '.join(missing[:3])}"
        )
    return checker


def _load_ip_adapter(pipe: Any, parts: Parts, path: Path) -> None:
    if pipe.image_encoder is None:
        raise ModelError(
            "model: ip_adapter needs image_encoder, the CLIP vision model that it was trained with"
        )
    try:
        pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    except Exception as error:
        raise ModelError(f"model: ip_adapter {path} does not fit {parts.base}: {error}") from error
    [layer] = pipe.unet.encoder_hid_proj.image_projection_layers
    if not isinstance(layer, ADAPTERS):
        known = ", ".join(kind.__name__ for kind in ADAPTERS)
        raise ModelError(
            f"model: ip_adapter {path.name} is a {type(layer).__name__}, which is not supported; known "
            f"are {known}"
        )
    plain = isinstance(layer, ImageProjection)
    encoder = pipe.image_encoder.config
    width = encoder.projection_dim if plain else encoder.hidden_size
    wanted = (
        layer.image_embeds.in_features
        if plain
        else getattr(getattr(layer, "proj_in", None), "in_features", width)
    )
    if width != wanted:
        features = f"image_encoder {parts.image_encoder} gives {width} features"
        raise ModelError(
            f"model: {features}, ip_adapter {path.name} reads {wanted}: name the encoder that it was "
            "made with"
        )
