"""Stable Diffusion's safety checker: its verdict on a finished picture, by diffusers' own class. Changes no pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.core.records import Pixels


class SafetyChecker:
    """checker: a StableDiffusionSafetyChecker on its device. It compares a picture's CLIP embedding with those of concepts
    that are not to be seen (Rando et al. 2022 say which, and how far it can be trusted)."""

    def __init__(self, checker: Any) -> None:
        side = checker.config.vision_config.image_size
        self.checker = checker
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.inference_mode()
    def __call__(self, image: Pixels) -> bool:
        """Whether it is unsafe; alone, so that no neighbour has a part in it."""
        values = self.processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        # It blackens the pictures that it is given: an empty one.
        _, [unsafe] = self.checker(values.to(self.checker.device, self.checker.dtype), [np.zeros(1)])
        return bool(unsafe)
