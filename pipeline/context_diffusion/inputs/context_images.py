"""Converts context images of any size to the uint8 pixels that a model's image encoder reads.

ImageProcessor follows a pretrained encoder's preprocessor configuration to the pixel; SquareCrop is what
native models are trained with; ReferenceImage keeps an image's own size. Knows Pillow and numpy only; the
mean and std of the normalisation are stored here, not applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from context_diffusion.core.errors import ErrorCode, ModelError, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Pixels
from context_diffusion.inputs.decode import decode_image, decode_resized, resize

# Side of the contexts of native models, at least: a texture is read at the scale of the output.
TEXTURE_PIXELS = 256
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SquareCrop:
    """Scales the shorter side to `size` pixels with Lanczos and crops the middle."""

    size: int

    def decode(self, data: bytes, limits: Limits, name: str) -> Pixels:
        """Decode an image file to (size, size, 3). Raises RowError as decode_image does."""
        return decode_resized(data, limits, name, lambda *_: (self.size, self.size), "crop")

    def apply(self, pixels: Pixels) -> Pixels:
        """Convert uint8 pixels (H, W, 3) to (size, size, 3)."""
        return resize(pixels, self.size, self.size, "crop")


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes and crops as transformers' CLIPImageProcessor does with its Pillow backend.

    resize: the shorter side, or (height, width), or None for no resize; crop: whether the middle is cropped
    to `size`, and smaller images are padded with black; resample: Pillow's number. The encoder reads (pixels
    · scale - mean) / std.
    """

    size: int
    resize: int | tuple[int, int] | None
    crop: bool = True
    resample: int = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def decode(self, data: bytes, limits: Limits, name: str) -> Pixels:
        """Decode an image file at full size, as diffusers does, and convert it to (size, size, 3).

        Raises RowError as decode_image does.
        """
        return self.apply(decode_image(data, limits, name))

    def apply(self, pixels: Pixels) -> Pixels:
        """Convert uint8 pixels (H, W, 3) to (size, size, 3)."""
        height, width = self._resized(*pixels.shape[:2])
        if (height, width) != pixels.shape[:2]:
            resample = Image.Resampling(self.resample)
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), resample))
        return center_crop(pixels, self.size) if self.crop else pixels

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width after the resize."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        longer = int(self.resize * long / short)
        return (longer, self.resize) if width <= height else (self.resize, longer)


@dataclass(frozen=True)
class ReferenceImage:
    """Keeps an image's own size up to `max_pixels`, for models that read the query and the contexts as
    references, as diffusers' Flux2KleinPipeline does.

    A larger image is scaled down with Lanczos; then the middle is cropped to multiples of `multiple`.
    """

    max_pixels: int
    multiple: int = 16
    min_side: int = 64
    max_aspect: float = 8.0

    def decode(self, data: bytes, limits: Limits, name: str) -> Pixels:
        """Decode an image file at full size and convert it to (H, W, 3).

        Raises RowError as decode_image does, and INVALID_REFERENCE for sides or an aspect ratio that the
        model does not take."""
        try:
            return self.apply(decode_image(data, limits, name))
        except RowError as error:
            if error.code == ErrorCode.INVALID_REFERENCE:
                raise RowError(error.code, f"{name}: {error.message}") from None
            raise

    def apply(self, pixels: Pixels) -> Pixels:
        """Convert uint8 pixels (H, W, 3) to (H', W', 3). Raises RowError as `decode` does."""
        height, width = pixels.shape[:2]
        self._check(width, height)
        if width * height > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (width * height))
            width, height = int(width * scale), int(height * scale)
            resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
            pixels = np.asarray(resized)
        right, lower = (side - side % self.multiple for side in (width, height))
        left, top = (width - right) // 2, (height - lower) // 2
        return np.ascontiguousarray(pixels[top : top + lower, left : left + right])

    def _check(self, width: int, height: int) -> None:
        if min(width, height) < self.min_side:
            problem = f"the model reads references with sides of at least {self.min_side} pixels"
        elif max(width, height) > self.max_aspect * min(width, height):
            problem = f"the model reads references with an aspect ratio of at most {self.max_aspect:g}"
        else:
            return
        raise RowError(ErrorCode.INVALID_REFERENCE, f"{width} x {height} pixels: {problem}")


MASK_ASPECT_TOLERANCE = 0.02
NO_MASKS = "this model has no IP-Adapter, whose contexts can have masks; leave them out"


def mask_of(pixels: Pixels, width: int, height: int, name: str) -> Pixels:
    """Scale a context's mask (H, W, 3) to the output's size as diffusers' IPAdapterMaskProcessor does, in
    grey.

    Raises RowError with INVALID_MASK for another aspect ratio than the output's."""
    rows, columns = pixels.shape[:2]
    if abs(columns * height / (rows * width) - 1) > MASK_ASPECT_TOLERANCE:
        raise RowError(
            ErrorCode.INVALID_MASK,
            f"context_masks: {name} has {columns} x {rows} pixels, another aspect ratio than the output's "
            f"{width} x {height}",
        )
    image = Image.fromarray(pixels)
    if (rows, columns) != (height, width):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2)


ContextPreprocessing = SquareCrop | ImageProcessor | ReferenceImage


def center_crop(pixels: Pixels, side: int) -> Pixels:
    """Crop uint8 pixels (H, W, 3) to (side, side, 3), and pad smaller images with black."""
    height, width = pixels.shape[:2]
    if height < side or width < side:
        padded = np.zeros((max(height, side), max(width, side), 3), np.uint8)
        top, left = -((height - padded.shape[0]) // 2), -((width - padded.shape[1]) // 2)
        padded[top : top + height, left : left + width] = pixels
        pixels = padded
        height, width = padded.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def image_processor(config: Mapping[str, Any] | None, image_size: int, name: str) -> ImageProcessor:
    """Read a preprocessor_config.json, or return CLIPImageProcessor's defaults if `config` is None, as
    diffusers does.

    image_size: pixels per side that the encoder reads; name: the encoder, for messages. Raises ModelError if
    the configuration does not produce such squares.
    """
    if config is None:
        return ImageProcessor(image_size, image_size)
    kind = str(
        config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
    )
    clip = kind.startswith("CLIP")
    size = (
        _size(config.get("size", 224), square=not clip, name=name) if config.get("do_resize", True) else None
    )
    crop = config.get("do_center_crop", clip or "crop_size" in config)
    result_size = _size(config.get("crop_size", 224), square=True, name=name) if crop else size
    if result_size != (image_size, image_size):
        result = "images of no fixed size"
        if isinstance(result_size, tuple):
            result = f"{result_size[1]} x {result_size[0]} pixels"
        raise ModelError(
            f"model: preprocessor_config.json of image_encoder {name} gives {result}, the encoder reads "
            f"{image_size} x {image_size}: correct its size and crop_size"
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
    """Read a configuration's size: the shorter side, or (height, width). Raises ModelError.

    square: whether a plain number means both sides; else it means the shorter one.
    """
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
