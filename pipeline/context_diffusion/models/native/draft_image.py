"""The draft as an image: the query in the colours of its contexts, with their texture and its own borders.

Where the contexts have one hue per tone, colours follow their curves by tone (models/native/draft.py); where
they have several, they are transported (models/native/colour_transport.py).

B rows  M contexts of a row  H W pixels
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.models.native.colour_transport import (
    hues_per_tone,
    lab_of,
    rgb_of,
    risen,
    stretched,
    transported,
)
from context_diffusion.models.native.draft import RATE, coloured, curves_of

TEXTURE, CHROMA = 0.8, 0.5  # factors of the contexts' texture: its lightness, and its chroma beside that
BORDER = 0.4  # factor of the query's finest lightness at its borders
STRONG = 9.0  # gradient of lightness, of 0 to 100 a pixel, that counts half as a border
SPARED = 0.7  # share of the texture that a strong border loses
FINE = 0.0156  # std, in shorter sides of the image, of the blur that fine lightness is without
HALO = 8.0  # lightness; fainter differences would be halos beside a border


def draft_image(
    query: Tensor, tones: Tensor, colours: Tensor, palette: Tensor | None, texture: Tensor
) -> Tensor:
    """Return the draft (1, 3, H, W) in [0, 1] of a query, uint8 (1, 3, H, W).

    tones: of draft.tones_of, (1, WAYS, H, W). colours: of draft.Look, (1, WAYS, STEPS, 4), over all contexts.
    palette: the contexts' colours, Lab (n, 3); None: a remembered look has curves only. texture: (H, W), in
    ranks."""
    lab = stretched(lab_of(query.float() / 255))
    curves = curves_of(colours)
    plain = _by_curves(tones, curves)
    hues = 0.0 if palette is None else hues_per_tone(palette)
    result = plain if palette is None else torch.lerp(plain, transported(lab, palette), hues)
    result = risen(result, lab[:, :1])
    texture = texture - texture.mean()  # the curve of colours contains it
    rate = tones.new_tensor(RATE)[:, None, None]
    added = _by_curves((tones + texture * rate).clamp(0, 1), curves) - plain
    added = added * added.new_tensor([1.0, *[CHROMA * (1 - hues)] * 2])[:, None, None]
    borders = border_strength(lab[:, :1])
    result = result + TEXTURE * (1 - SPARED * borders) * added
    fine = lab[:, :1] - blurred(lab[:, :1], FINE * min(lab.shape[2:]))
    fine = fine * fine.square() / (fine.square() + HALO**2)
    lightness = result[:, :1] + BORDER * borders * fine
    return rgb_of(torch.cat([lightness.clamp(0, 100), result[:, 1:]], 1))


def _by_curves(tones: Tensor, curves: Tensor) -> Tensor:
    return lab_of((torch.stack(coloured(tones, curves)).mean(0) / 2 + 0.5).clamp(0, 1))


def border_strength(lightness: Tensor) -> Tensor:
    """Return how strong a border is at each pixel, 0 to 1, of lightness (1, 1, H, W), for its neighbours
    too."""
    padded = F.pad(blurred(lightness, 0.7), (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    square = F.max_pool2d(across.square() + down.square(), 3, 1, 1)
    return blurred(square / (square + STRONG**2), 0.7)


def blurred(images: Tensor, std: float) -> Tensor:
    """Blur (1, 1, H, W) by a Gaussian of `std` pixels."""
    reach = min(round(3 * std), images.shape[2] - 1, images.shape[3] - 1)
    places = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-places.square() / (2 * std**2))
    weights = weights / weights.sum()
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights[None, None, None]), weights[None, None, :, None])
