"""Depth maps of queries for ControlNets, by a depth model of transformers. Knows no rows and no steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from context_diffusion.core.errors import ModelError
from context_diffusion.core.records import Pixels
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.resolution.hub import fetch
from context_diffusion.models.resolution.resolve import PREPROCESSOR

# transformers' models that predict distances, so that far is large. The others predict inverse depth, as does
# MiDaS, which made the maps that depth ControlNets were trained on; those of Zoe are inverted for them.
DISTANCES = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")
TRIED_SIDE = 64  # pixels of the image with which a model is tried


class DepthEstimator:
    """Estimate depth as uint8, near is bright, as in the maps that depth ControlNets were trained on.

    model: of transformers, on its device, in float32: half precision would show as bands, and a query is
    estimated once. processor: the model's image processor. A map is that of transformers' pipeline
    "depth-estimation" for the image alone; of a model that predicts distances it is inverted."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.inverted = predicts_distance(model.config)

    @torch.inference_mode()
    def __call__(self, image: Pixels) -> Tensor:
        """Return the map, (1, 3, H, W) uint8, on the model's device, of an image uint8 (H, W, 3)."""
        depth = self.depth(image)
        least, most = depth.min(), depth.max()
        spread = most - least
        shares = torch.where(spread > 0, (depth - least) / spread, 0.0)  # a flat one is all far
        levels = (shares * 255).to(torch.uint8)
        levels = torch.where(spread > 0, 255 - levels, levels) if self.inverted else levels
        return levels[None, None].expand(1, 3, -1, -1).contiguous()

    @torch.inference_mode()
    def depth(self, image: Pixels) -> Tensor:
        """Return what the model predicts of an image, (H, W) float32."""
        inputs = self.processor(images=Image.fromarray(image), return_tensors="pt")
        values = pinned(inputs["pixel_values"].float(), self.model.device)
        [outcome] = self.processor.post_process_depth_estimation(self.model(values), [image.shape[:2]])
        return outcome["predicted_depth"].float()


def predicts_distance(config: Any) -> bool:
    """Return whether a model predicts distances, by its configuration: a metric Depth Anything does, and a
    DPT on DINOv2, which is published as one of NYU's or KITTI's distances."""
    backbone = getattr(getattr(config, "backbone_config", None), "model_type", None)
    metric = getattr(config, "depth_estimation_type", None) == "metric"
    return metric or config.model_type in DISTANCES or (config.model_type, backbone) == ("dpt", "dinov2")


def load_depth_estimator(loader: ComponentLoader, part: str, device: torch.device) -> DepthEstimator:
    """Load a depth model on the device, safetensors only, no remote code. Raises ModelError."""
    whole = replace(loader, parts=loader.parts.model_copy(update={"dtype": "float32"}))
    options = {"output_loading_info": True, "trust_remote_code": False}
    model, info = whole(AutoModelForDepthEstimation, part, **options)
    # transformers would use random ones. Published DPTs lack some that the model does not read.
    missing = sorted(info["missing_keys"])
    for name in missing:
        model.get_parameter(name).data.fill_(torch.nan)
    folder = fetch(part, PREPROCESSOR, loader.parts.revision).parent
    try:
        # The processor by Pillow, whether torchvision is there or not: its pixels differ.
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
        estimator = DepthEstimator(model.to(device).eval().requires_grad_(False), processor)
        depth = estimator.depth(np.zeros((TRIED_SIDE, TRIED_SIDE, 3), np.uint8))
    except Exception as error:  # a processor of another kind, one that needs torchvision, another input
        raise ModelError(f"model: depth_estimator {part} cannot be used: {error}") from error
    if not depth.isfinite().all():
        reason = (
            f"{len(missing)} weights are missing, {', '.join(missing[:3])}" if missing else "it predicts NaN"
        )
        raise ModelError(f"model: depth_estimator {part} cannot be used: {reason}")
    return estimator
