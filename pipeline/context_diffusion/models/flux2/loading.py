"""Load a pretrained FLUX.2 [klein] by diffusers' own loader. Knows no rows and no steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.flux2.offloading import Offload, Offloaded, wants_offloading
from context_diffusion.models.flux2.prompts import LAYERS
from context_diffusion.models.lora import fuse_loras


@dataclass(frozen=True)
class Flux2:
    """A loaded model. pipe: diffusers' pipeline; offloaded: its text encoder, where it is not on the
    device."""

    pipe: Any
    parts: Parts
    offloaded: Offloaded | None


def load_flux2(parts: Parts, device: torch.device, offload: Offload = "auto") -> Flux2:
    """Load diffusers' Flux2KleinPipeline on the device, in the dtype of the parts. Raises ModelError.

    offload: whether the text encoder may stay in the host's memory."""
    pipe = ComponentLoader(parts, device)(diffusers.Flux2KleinPipeline, parts.base)
    if pipe.transformer.config.guidance_embeds:
        raise ModelError(
            f"model: the transformer of {parts.base} reads the guidance scale, as that of FLUX.2 [dev]; "
            "only FLUX.2 [klein] is supported"
        )
    fuse_loras(pipe, parts, "transformer.")
    pipe.set_progress_bar_config(disable=True)
    take_apart(pipe.text_encoder, parts.base)
    networks = [pipe.transformer, pipe.vae, pipe.text_encoder]
    away = wants_offloading(offload, networks, device)
    for network in networks:
        network.eval().requires_grad_(False)
        if not (away and network is pipe.text_encoder):
            network.to(device)
    return Flux2(pipe, parts, Offloaded(pipe.text_encoder, device) if away else None)


def take_apart(text_encoder: Any, base: str) -> None:
    """Remove what follows the last layer that the transformer reads. Raises ModelError where the text encoder
    has fewer layers. base: for messages."""
    decoder = text_encoder.model
    if len(decoder.layers) < LAYERS[-1]:
        raise ModelError(
            f"model: the text encoder of {base} has {len(decoder.layers)} layers, the transformer reads the "
            f"output of layer {LAYERS[-1]}"
        )
    if len(decoder.layers) > LAYERS[-1]:
        decoder.layers = decoder.layers[: LAYERS[-1]]
        decoder.norm = nn.Identity()  # it follows the last layer of all, not the last one that is left
    text_encoder.lm_head = nn.Identity()
