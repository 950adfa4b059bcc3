"""Dynamic normalisation: each image's own mean and std are measured and removed, and may be restored at the
end.

The removed statistics, and the mean colours from dark to light, can be given to the model as numbers.
Every function treats its images one by one. N images  H W pixels
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.core.job_base import NormalizationKind
from context_diffusion.models.texture_features import TEXTURE_STATISTICS, describe_textures

LEVEL = 1 / 255  # the smallest std: a constant image becomes 0, not NaN
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
TONES, TONE_SIDE = 8, 32  # steps from dark to light; pixels a side that are sorted into them
STATISTICS = 3 + 3 + 3 * TONES + TEXTURE_STATISTICS


def normalise(images: Tensor, kind: NormalizationKind) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise uint8 (N, 3, H, W); return float values, and the measured mean and std (N, 3) of [0, 1].

    kind `channel`: each channel of an image gets mean 0 and std 1. `image`: all its channels together, so
    that its hues stay. `none`: values in [0, 1]; mean and std are measured by channel and not removed."""
    values = images.float() / 255
    mean, std = _measure(values, kind)
    if kind != "none":
        values = (values - mean[..., None, None]) / std.clamp(min=LEVEL)[..., None, None]
    return values, mean.expand(-1, 3), std.expand(-1, 3)


def describe(images: Tensor) -> Tensor:
    """Describe uint8 (N, 3, H, W) by (N, STATISTICS) numbers of about -2 to 2.

    They are the mean and std of each channel; the mean colour of each eighth of the pixels from the darkest
    to the lightest, which maps tones to colours (as histogram matching does; Reinhard et al. 2001 with more
    than two moments); and its textures."""
    values = images.float() / 255
    mean, std = _measure(values, "channel")
    pixels = F.adaptive_avg_pool2d(values, TONE_SIDE).flatten(2)
    order = (pixels * values.new_tensor(LUMA)[:, None]).sum(1).argsort(stable=True, dim=1)
    sorted_pixels = pixels.gather(2, order[:, None].expand(-1, 3, -1))
    tones = sorted_pixels.unflatten(2, (TONES, -1)).mean(3).flatten(1)
    return torch.cat([4 * mean - 2, 8 * std - 1, 4 * tones - 2, describe_textures(lightness_of(values))], 1)


def lightness_of(values: Tensor) -> Tensor:
    """Return the luma (N, 1, H, W) of float (N, 3, H, W), in the same units."""
    return (values * values.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def restore(images: Tensor, contexts: Tensor, weights: Tensor) -> Tensor:
    """Give images (N, 3, H, W) in [0, 1] the contexts' statistics: each channel's own mean and std are moved
    to the weighted mean of the contexts' (colour transfer after Reinhard et al. 2001, in RGB).

    contexts: uint8 (M, 3, S, S); weights: (M,) >= 0. The images are returned unchanged if all weights are 0.
    """
    if not bool((weights > 0).any()):
        return images
    shares = (weights / weights.sum())[:, None]
    mean, std = (
        (shares * part).sum(0)[:, None, None] for part in _measure(contexts.float() / 255, "channel")
    )
    own_mean, own_std = (part[..., None, None] for part in _measure(images.float(), "channel"))
    return ((images - own_mean) / own_std.clamp(min=LEVEL) * std + mean).clamp(0, 1)


def _measure(values: Tensor, kind: NormalizationKind) -> tuple[Tensor, Tensor]:
    """Return mean and std, (N, 3) by channel; (N, 1) for kind `image`."""
    rows = values.flatten(1)[:, None] if kind == "image" else values.flatten(2)
    return rows.mean(2), torch.std(rows, 2, correction=0)


def resized(images: Tensor, side: int) -> Tensor:
    """Resize (N, C, S, S) to (N, C, side, side)."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=True)
