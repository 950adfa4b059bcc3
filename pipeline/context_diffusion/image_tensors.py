"""Images as tensors, dynamically normalised, for the Python API. Knows nothing of Ray.

Shapes: C = 3 channels RGB, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.records import Pixels
from context_diffusion.inputs.context_images import CLIP_MEAN, CLIP_STD, ContextPreprocessing, mask_of
from context_diffusion.inputs.decode import Size, decode_image, decode_resized, resize, rgb_pixels
from context_diffusion.storage.filesystem import Storage

Normalization = Literal["dynamic", "clip", "none"]
LEVEL = 1 / 255
# Methods that change neither an image's values nor its channels.
REMEMBERING = {"to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda", "pin_memory", "clone",
               "detach",
               "contiguous", "unsqueeze", "squeeze", "requires_grad_"}  # fmt: skip


class ImageTensor(torch.Tensor):
    """(3, H, W) float32 with what normalisation removed: `removed_mean` and `removed_std`, 3 values of [0, 1]
    each.

    Copies with the same values have them too (REMEMBERING, deepcopy, pickle); every other result is a plain
    tensor."""

    removed_mean: list[float]
    removed_std: list[float]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if (
            getattr(func, "__name__", "") in REMEMBERING
            and type(result) is torch.Tensor
            and _remembers(args[0])
        ):
            return _remember(result, args[0].removed_mean, args[0].removed_std)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copy = self.clone()
        return copy


def _remembers(value: Any) -> bool:
    return isinstance(value, ImageTensor) and hasattr(value, "removed_mean")


def _remember(values: torch.Tensor, mean: list[float], std: list[float]) -> ImageTensor:
    tensor = values.as_subclass(ImageTensor)
    tensor.removed_mean, tensor.removed_std = list(mean), list(std)
    return tensor


def load_image_as_tensor(
    source: Any, size: int | tuple[int, int] | None = None, normalization: Normalization = "dynamic"
) -> ImageTensor:
    """Load an image as float32 (3, H, W); `to_image` converts it back.

    source: path, URI, bytes, PIL image or uint8 array (H, W, 3). size: a side or (width, height), cropped at
    the centre. normalization: `dynamic` removes the image's own mean and std by channel (as the model does; a
    constant image becomes 0), `clip` CLIP's constants, `none` leaves values in [0, 1]. Raises
    FileNotFoundError, RowError if it is no image, ValueError for a wrong size or normalization."""
    if normalization not in get_args(Normalization):
        raise ValueError(
            f"normalization must be one of {', '.join(get_args(Normalization))}, not {normalization!r}"
        )
    wanted = None if size is None else _size(size)
    pixels = to_pixels(source)
    if wanted is not None:
        pixels = resize(pixels, *wanted, "crop")
    values = channels_first(pixels.copy()).float().contiguous() / 255  # (3, H, W)
    mean, std = torch.zeros(3), torch.ones(3)
    if normalization == "dynamic":
        mean, std = values.mean((1, 2)), values.flatten(1).std(1, correction=0).clamp(min=LEVEL)
        # A constant channel is 0 exactly, not the rounding error of its mean over one level.
        mean = torch.where(values.amax((1, 2)) == values.amin((1, 2)), values[:, 0, 0], mean)
    elif normalization == "clip":
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return _remember((values - mean[:, None, None]) / std[:, None, None], mean.tolist(), std.tolist())


def channels_first(pixels: Pixels | Sequence[Pixels]) -> torch.Tensor:
    """Turn pixels (H, W, 3), or N of them, into a tensor (3, H, W), or (N, 3, H, W), of the same type.

    The channels stay last in memory, which one array shares with its tensor: copy an array that is
    read-only."""
    return torch.from_numpy(np.asarray(pixels)).movedim(-1, -3)


def _size(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(type(s) is int and s >= 1 for s in sides)
    ):
        raise ValueError(f"size must be a positive number of pixels or a pair (width, height), not {size!r}")
    return sides[0], sides[1]


def to_image(tensor: torch.Tensor) -> Image.Image:
    """Return the image of a tensor (3, H, W), to rounding. What normalisation removed is added back; others
    are in [0, 1]."""
    return Image.fromarray(_tensor_pixels(tensor))


def to_pixels(source: Any) -> Pixels:
    """Convert anything that the Python API takes as an image to uint8 (H, W, 3).

    source: ImageTensor (what was removed is added back), float tensor (3, H, W) in [0, 1], PIL image, uint8
    array (H, W, 3), path, URI or bytes. Raises FileNotFoundError, RowError for bytes that are no image,
    ValueError for a wrong shape or range, TypeError for anything else."""
    if (file := _file(source)) is not None:
        return decode_image(file[0], Limits(), file[1])
    if isinstance(source, torch.Tensor):
        return _tensor_pixels(source)
    if isinstance(source, Image.Image):
        return rgb_pixels(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"an image array must be uint8 (H, W, 3), not {source.dtype} {source.shape}")
        return np.ascontiguousarray(source)
    raise TypeError(
        f"an image must be a path, URI, bytes, PIL image, array or tensor, not a {type(source).__name__}"
    )


def to_resized(source: Any, size_of: Callable[[int, int], Size], fit: Fit) -> Pixels:
    """Load and resize an image, to the same pixels as a job. size_of: computes the wanted (width, height)
    from the image's."""
    if (file := _file(source)) is not None:
        return decode_resized(file[0], Limits(), file[1], size_of, fit)
    pixels = to_pixels(source)
    return resize(pixels, *size_of(pixels.shape[1], pixels.shape[0]), fit)


def to_context(source: Any, preprocessing: ContextPreprocessing) -> Pixels:
    """Turn a context of any kind into the pixels that the encoder reads, in the same way as a job."""
    if (file := _file(source)) is not None:
        return preprocessing.decode(file[0], Limits(), file[1])
    return preprocessing.apply(to_pixels(source))


def to_mask(source: Any, size: Size, name: str) -> Pixels:
    """Turn a context's mask of any kind into pixels (H, W, 3) at the output's size (width, height), in the
    same way as a job. source: as for `to_pixels`, or an array (H, W) of uint8 or bool. name: for messages.

    Raises as `to_pixels` does, and RowError for another aspect ratio."""
    if (file := _file(source)) is not None:
        pixels = decode_image(file[0], Limits(), file[1], "black")
    elif isinstance(source, Image.Image):
        pixels = rgb_pixels(source, "black")
    elif isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype in (np.uint8, np.bool_):
        grey = source if source.dtype == np.uint8 else source.astype(np.uint8) * 255
        pixels = np.repeat(grey[..., None], 3, 2)
    else:
        pixels = to_pixels(source)
    return mask_of(pixels, *size, name)


def _file(source: Any) -> tuple[bytes, str] | None:
    """Return an image file's bytes and name; None: the source is no file."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), "the bytes"
    if not isinstance(source, str | os.PathLike):
        return None
    uri = os.fspath(source)
    try:
        return Storage().read_input(uri, Limits().max_bytes), uri
    except RowError as error:
        if error.code == ErrorCode.MISSING_FILE:
            raise FileNotFoundError(error.message) from None
        raise


def _tensor_pixels(tensor: torch.Tensor) -> Pixels:
    values = tensor.as_subclass(torch.Tensor).detach()
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]  # a batch of one
    if values.ndim != 3 or values.shape[0] != 3 or not values.numel() or not values.is_floating_point():
        raise ValueError(f"an image tensor must be float (3, H, W), not {values.dtype} {tuple(tensor.shape)}")
    values = values.float().cpu()
    if isinstance(tensor, ImageTensor) and _remembers(tensor):
        mean, std = torch.tensor(tensor.removed_mean), torch.tensor(tensor.removed_std)
        values = values * std[:, None, None] + mean[:, None, None]
    elif not (values.min() >= -LEVEL / 2 and values.max() <= 1 + LEVEL / 2):  # NaN is not either
        extremes = f"{values.min():.3g} to {values.max():.3g}"
        raise ValueError(
            f"a plain image tensor must be in [0, 1], not {extremes}: clamp it, or undo its normalisation"
        )
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
