"""Stable Diffusion's safety checker: its verdict on a finished image, by diffusers' own class. Changes no
pixel."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.core.records import Pixels

STRICTER = 0.01  # of a cosine


class SafetyChecker:
    """Check images. checker: a StableDiffusionSafetyChecker on its device.

    It compares an image's CLIP embedding with those of unwanted concepts (Rando et al. 2022 describe its
    limits)."""

    def __init__(self, checker: Any) -> None:
        side = checker.config.vision_config.image_size
        self.checker = checker
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    @torch.inference_mode()
    def __call__(self, image: Pixels) -> bool:
        """Return whether an image is unsafe, by diffusers' rule. Images are checked one at a time.

        An image that is near to a special concept is held to stricter thresholds for all concepts. diffusers'
        own method waits for the device at each concept, this one once."""
        values = self.processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        checker = self.checker
        features = checker.vision_model(values.to(checker.device, checker.dtype))[1]
        embedding = F.normalize(checker.visual_projection(features))
        special = _over(embedding, checker.special_care_embeds, checker.special_care_embeds_weights, 0.0)
        stricter = STRICTER * special.any()
        unsafe = _over(embedding, checker.concept_embeds, checker.concept_embeds_weights, stricter)
        return bool(unsafe.any())


def _over(embedding: Tensor, concepts: Tensor, thresholds: Tensor, stricter: Tensor | float) -> Tensor:
    """Return which concepts (N,) an embedding (1, D) is nearer to than their thresholds, in cosines of three
    decimals."""
    cosines = (embedding @ F.normalize(concepts).T)[0].float()
    return (cosines - thresholds.float() + stricter).round(decimals=3) > 0
