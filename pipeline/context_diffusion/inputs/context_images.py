"""Context images of any size -> the square uint8 pixels that a model's image encoder reads.

Two ways: a pretrained encoder's own preprocessor configuration, followed to the pixel, and the plain square crop that the
native models are trained with. Knows Pillow and numpy only; what stands after the pixels (mean, std) is data here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from context_diffusion.core.errors import ModelError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Pixels
from context_diffusion.inputs.decode import decode_image, decode_resized, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SquareCrop:
    """Scale the shorter side to `size` pixels and crop the middle, with Lanczos: what native models are trained with."""

    size: int

    def decode(self, data: bytes, limits: Limits, name: str) -> Pixels:
        """Decode an image file to (size, size, 3). Raises RowError as decode_image does."""
        return decode_resized(data, limits, name, lambda *_: (self.size, self.size), "crop")

    def apply(self, pixels: Pixels) -> Pixels:
        """uint8 (H, W, 3) -> (size, size, 3)."""
        return resize(pixels, self.size, self.size, "crop")


@dataclass(frozen=True)
class ImageProcessor:
    """What transformers' CLIPImageProcessor (its Pillow backend) does to an image.

    resize: the shorter side, or (height, width), or None for no resize. crop: whether the middle is cropped to `size`,
    padded with black where it is smaller. resample: Pillow's number. The encoder reads (pixels · scale - mean) / std.
    """

    size: int
    resize: int | tuple[int, int] | None
    crop: bool = True
    resample: int = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def decode(self, data: bytes, limits: Limits, name: str) -> Pixels:
        """Decode an image file to (size, size, 3), all its pixels, as diffusers does. Raises RowError as decode_image does."""
        return self.apply(decode_image(data, limits, name))

    def apply(self, pixels: Pixels) -> Pixels:
        """uint8 (H, W, 3) -> (size, size, 3)."""
        height, width = self._resized(*pixels.shape[:2])
        if (height, width) != pixels.shape[:2]:
            resample = Image.Resampling(self.resample)
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), resample))
        return center_crop(pixels, self.size) if self.crop else pixels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)
        return (longer, self.resize) if width <= height else (self.resize, longer)


ContextPreprocessing = SquareCrop | ImageProcessor


def center_crop(pixels: Pixels, side: int) -> Pixels:
    """uint8 (H, W, 3) -> (side, side, 3); black where the image is smaller."""
    height, width = pixels.shape[:2]
    if height < side or width < side:
        padded = np.zeros((max(height, side), max(width, side), 3), np.uint8)
        top, left = -((height - padded.shape[0]) // 2), -((width - padded.shape[1]) // 2)
        padded[top : top + height, left : left + width] = pixels
        pixels, (height, width) = padded, padded.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def image_processor(config: Mapping[str, Any] | None, image_size: int, name: str) -> ImageProcessor:
    """Read a preprocessor_config.json; None: CLIPImageProcessor's defaults at the encoder's size, as diffusers takes them.

    image_size: pixels per side that the encoder reads. name: the encoder, for messages. Raises ModelError for a
    configuration whose result is not such a square.
    """
    if config is None:
        return ImageProcessor(image_size, image_size)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor")
    clip = kind.startswith("CLIP")
    size = _size(config.get("size", 224), square=not clip, name=name) if config.get("do_resize", True) else None
    crop = config.get("do_center_crop", clip or "crop_size" in config)
    made = _size(config.get("crop_size", 224), square=True, name=name) if crop else size
    if made != (image_size, image_size):
        result = "images of no fixed size" if not isinstance(made, tuple) else f"{made[1]} x {made[0]} pixels"
        raise ModelError(
            f"model: preprocessor_config.json of image_encoder {name} gives {result}, the encoder reads "
            f"{image_size} x {image_size}: mend its size and crop_size"
        )
    normalized = config.get("do_normalize", True)
    return ImageProcessor(
        image_size,
        size,
        bool(crop),
        int(config.get("resample", Image.Resampling.BICUBIC)),
        float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        tuple(config.get("image_mean", CLIP_MEAN)) if normalized else (0.0, 0.0, 0.0),
        tuple(config.get("image_std", CLIP_STD)) if normalized else (1.0, 1.0, 1.0),
    )


def _size(value: Any, square: bool, name: str) -> int | tuple[int, int]:
    """A configuration's size: the shorter side, or (height, width). square: what a plain number means."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        return int(value["height"]), int(value["width"])
    raise ModelError(
        f"model: preprocessor_config.json of image_encoder {name} has the size {value!r}; "
        "expected a number, shortest_edge, or height and width"
    )
