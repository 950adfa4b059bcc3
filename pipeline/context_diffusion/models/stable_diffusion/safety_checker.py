"""Stable Diffusion's safety checker: its verdict on a finished image, by diffusers' own class. Changes no
pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.core.records import Pixels


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
        """Return whether an image is unsafe; it is checked alone, so that no other image matters."""
        values = self.processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        # The checker blackens the images that it is given, so it gets an empty one.
        _, [unsafe] = self.checker(values.to(self.checker.device, self.checker.dtype), [np.zeros(1)])
        return bool(unsafe)
