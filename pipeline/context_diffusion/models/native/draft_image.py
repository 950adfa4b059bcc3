"""The draft as an image: the query in the colours of its contexts, with their texture and its own borders.

Where the contexts have one hue per tone, colours follow their curves by tone (models/native/draft.py); where
they have several, they are transported (models/native/colour_transport.py). A texture has lightness and, from
contexts, chroma: it is (3, H, W), in ranks and in Lab's a and b.

B rows  M contexts of a row  H W pixels  S side of a measured texture
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.models.native.colour_transport import (
    Palette,
    blurred,
    fine_chroma,
    hues_per_tone,
    lab_of,
    matched_chroma,
    rgb_of,
    risen,
    stretched,
    transported,
)
from context_diffusion.models.native.draft import RATE, VIVID, coloured, curves_of, tones_of
from context_diffusion.models.native.texture_separation import ReliefModel
from context_diffusion.models.normalization import resized

TEXTURE, CHROMA = 0.55, 0.5  # factors of the texture's lightness, and of the chroma that comes with lightness
FINE_CHROMA = 1.3  # factor of the texture's own chroma: averaging at seams makes it paler
CHROMA_FITS = 0.03  # ranks for a unit of chroma where blocks of a texture are compared
TRIALS = 16  # places of which a block of a texture is taken from the best
BORDER = 0.4  # factor of the query's finest lightness at its borders
STRONG = 9.0  # gradient of lightness, of 0 to 100 a pixel, that counts half as a border
SPARED = 0.7  # share of the texture that a strong border loses
FINE = 0.0156  # std, in shorter sides of the image, of the blur that fine lightness is without
HALO = 8.0  # lightness; fainter differences would be halos beside a border


def draft_image(
    query: Tensor, tones: Tensor, colours: Tensor, palette: Palette | None, texture: Tensor
) -> Tensor:
    """Return the draft (1, 3, H, W) in [0, 1] of a query, uint8 (1, 3, H, W).

    tones: of draft.tones_of, (1, WAYS, H, W). colours: of draft.Look, (1, WAYS, STEPS, 4), over all contexts.
    palette: the contexts' colours; None: a remembered look has curves only. texture: (3, H, W)."""
    lab = stretched(lab_of(query.float() / 255))
    curves = curves_of(colours)
    plain = _by_curves(tones, curves)
    hues = 0.0 if palette is None else hues_per_tone(palette.colours)
    result = plain if palette is None else torch.lerp(plain, transported(lab, palette.coarse), hues)
    result = risen(result, lab[:, :1])
    texture, chroma = texture[0] - texture[0].mean(), texture[1:]  # the curve of colours contains the mean
    rate = tones.new_tensor(RATE)[:, None, None]
    added = _by_curves((tones + texture * rate).clamp(0, 1), curves) - plain
    added = added * added.new_tensor([1.0, *[CHROMA * (1 - hues)] * 2])[:, None, None]
    borders = border_strength(lab[:, :1])
    share = 1 - SPARED * borders  # of the texture, less at borders
    result = result + TEXTURE * share * added
    if palette is not None:
        textured = result[:, 1:] + FINE_CHROMA * share * chroma
        result = matched_chroma(torch.cat([result[:, :1], textured], 1), palette.colours)
    fine = lab[:, :1] - blurred(lab[:, :1], FINE * min(lab.shape[2:]))
    fine = fine * fine.square() / (fine.square() + HALO**2)
    # A dark shape would have a light halo: no pixel gets lighter than the lightest one around it.
    lightest = local_maximum(result[:, :1], round(2 * FINE * min(lab.shape[2:])))
    lightness = (result[:, :1] + BORDER * borders * fine).minimum(lightest)
    return rgb_of(torch.cat([lightness.clamp(0, 100), result[:, 1:]], 1))


def give_back(
    images: Tensor, drafts: Tensor, copies: Tensor, share: Tensor | float, rest_scale: Tensor | float
) -> Tensor:
    """Return drafts + rest_scale · (images - copies), mixed with images where `share` is below 1; (B, 3, H,
    W) in [0, 1].

    images: decoded. copies: what the autoencoder makes of the drafts. What it loses of both is the same, and
    cancels."""
    return (images + share * (drafts + rest_scale * (images - copies) - images)).clamp(0, 1)


def texture_of(relief: ReliefModel, context: Tensor, side: int) -> Tensor:
    """Measure the texture of a context, uint8 (1, 3, S, S), at the scale of images of `side` pixels.

    Returns (3, s, s) of mean 0, where s is `side` or, for larger images, S: enlarged pixels would have no
    fine texture.
    """
    small = resized(context.float(), min(side, context.shape[-1])).round().clamp(0, 255)
    lightness = VIVID * relief.texture(tones_of(small)) if relief.learned else torch.zeros_like(small[:, 0])
    texture = torch.cat([lightness, fine_chroma(lab_of(small / 255))[0]])
    return texture - texture.mean((1, 2), keepdim=True)


def synthesise(texture: Tensor, height: int, width: int, seed: int) -> Tensor:
    """Synthesise a texture (C, H, W) from a measured one (C, S, S) whose channels have mean 0.

    Overlapping blocks are placed beside what continues them: of some places that the seed draws, each block
    is taken from the one that fits best (after Efros and Freeman 2001, with soft seams). Windows whose
    squares add up to 1 keep the strength of a texture whose blocks differ."""
    step = min(texture.shape[1:]) // 4
    side = 2 * step
    draw = random.Random(seed)
    half = torch.sin((torch.arange(side, device=texture.device) + 0.5) * (torch.pi / side))
    window = half[:, None] * half
    scale = texture.new_tensor([1.0, CHROMA_FITS, CHROMA_FITS])[: len(texture), None, None]
    rows, columns = (-(-size // step) + 1 for size in (height, width))
    canvas = texture.new_zeros(len(texture), (rows + 1) * step, (columns + 1) * step)
    for top in range(0, rows * step, step):
        for left in range(0, columns * step, step):
            here = canvas[:, top : top + side, left : left + side]
            trials = [
                (draw.randint(0, texture.shape[1] - side), draw.randint(0, texture.shape[2] - side))
                for _ in range(TRIALS)
            ]
            blocks = torch.stack([texture[:, y : y + side, x : x + side] for y, x in trials]) * window
            compared = blocks * scale
            norms = compared.square().mean((1, 2, 3)).sqrt().clamp(min=1e-6)
            fits = (compared * (here * scale)).mean((1, 2, 3)) / norms
            here += blocks[int(fits.argmax())]
    return canvas[:, step : step + height, step : step + width]


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


def local_maximum(images: Tensor, reach: int) -> Tensor:
    """Return the maximum of (1, 1, H, W) over the square of `reach` pixels around each pixel."""
    rows = F.max_pool2d(images, (1, 2 * reach + 1), 1, (0, reach))
    return F.max_pool2d(rows, (2 * reach + 1, 1), 1, (reach, 0))
