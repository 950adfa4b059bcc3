"""Load a pretrained FLUX.2 [klein] by diffusers' own loader. Knows no rows and no steps."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.lora import fuse_loras


def load_flux2(parts: Parts, device: torch.device) -> Any:
    """Load diffusers' Flux2KleinPipeline on the device, in the dtype of the parts. Raises ModelError."""
    pipe = ComponentLoader(parts, device)(diffusers.Flux2KleinPipeline, parts.base)
    if pipe.transformer.config.guidance_embeds:
        raise ModelError(
            f"model: the transformer of {parts.base} reads the guidance scale, as that of FLUX.2 [dev]; "
            "only FLUX.2 [klein] is supported"
        )
    fuse_loras(pipe, parts, "transformer.")
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.to(device).eval().requires_grad_(False)
    return pipe
