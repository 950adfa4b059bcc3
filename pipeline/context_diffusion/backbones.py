"""Load the backbone of a model of any kind."""

from __future__ import annotations

from collections.abc import Callable

import torch

from context_diffusion.core.model_parts import CHUNKS
from context_diffusion.core.records import Pixels
from context_diffusion.engine.backbone import Backbone
from context_diffusion.models.flux2.offloading import Offload
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import ResolvedModel


def load_backbone(
    model: ResolvedModel, device: torch.device, offload: Offload = "auto"
) -> tuple[Backbone, Callable[[Pixels], bool] | None]:
    """Load the weights of a model on the device. Returns it with its safety checker. Raises ModelError.

    offload: see `ContextDiffusion.from_pretrained`."""
    if model.kind == "native":
        assert model.folder
        return NativeBackbone(NativeModel.from_pretrained(model.folder).to(device)), None
    assert model.parts
    # Each imports diffusers' pipelines, which takes some seconds.
    if model.kind == "flux2":
        from context_diffusion.models.flux2.backbone import Flux2Backbone
        from context_diffusion.models.flux2.loading import load_flux2

        # A lane that fills its chunk needs no padding, nor the mask that slower attention kernels take.
        padded = CHUNKS[model.kind, device.type][0] > 1
        return Flux2Backbone(load_flux2(model.parts, device, offload), model, padded), None
    from context_diffusion.models.stable_diffusion.backbone import StableBackbone
    from context_diffusion.models.stable_diffusion.loading import load

    loaded = load(model.parts, device)
    return StableBackbone(loaded, model), loaded.unsafe
