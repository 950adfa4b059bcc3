"""The looks of a pool's styles: their colours and textures alone, to be remembered, and as the pool's pictures show them.

S styles of a pool  P pictures of it
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from context_diffusion.model.draft import colours_of, tones_of
from context_diffusion.model.normalization import lightness_of
from context_diffusion.model.recall import Kind, describe_colours, describe_relief
from context_diffusion.schema import Pixels
from context_diffusion.training.data import Pool
from context_diffusion.training.layouts import Rng
from context_diffusion.training.prompts import TEXTURE_WORDS
from context_diffusion.training.styles import Style, dress

BARE = {"outline": 0.0, "light": (0.0, 0.0), "grain": 0.0}
GREY = np.repeat(np.linspace(0, 1, 256, dtype=np.float32)[:, None], 3, 1)
PART = 64  # pictures at once


class Described(NamedTuple):
    """Of one kind. looks: (S, ...), as the memory keeps them, with their descriptions kept: (S, numbers); seen:
    (P, numbers), of pictures."""

    looks: Tensor
    kept: Tensor
    seen: Tensor


def describe_pool(pool: Pool, side: int) -> dict[Kind, Described]:
    """side: pixels of a kept texture."""
    parts = [_tensor(pool.targets[i : i + PART]) for i in range(0, len(pool.targets), PART)]
    swatches = torch.cat([swatch(style) for style in pool.styles])
    reliefs = torch.stack([relief(style, side) for style in pool.styles])
    colours = torch.cat([describe_colours(colours_of(part, tones_of(part))) for part in parts])
    textures = torch.cat([describe_relief(lightness_of(part.float()) / 255) for part in parts])
    return {
        "colours": Described(swatches, describe_colours(swatches), colours),
        "texture": Described(reliefs, describe_relief(reliefs[:, None] + 0.5), textures),
    }


def swatch(style: Style) -> Tensor:
    """All its colours, from dark to light, as draft.Look has them: (1, WAYS, STEPS, 4)."""
    tones = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    bare = replace(style, texture="flat", **BARE)  # type: ignore[arg-type]
    image = _tensor(dress(tones, bare, np.random.default_rng(0))[None])
    return colours_of(image, tones_of(image))


def relief(style: Style, side: int) -> Tensor:
    """Its texture alone, in tone: (side, side)."""
    bare = replace(style, lut=GREY, **BARE)  # type: ignore[arg-type]
    even = np.full((side, side), 0.5, np.float32)
    return torch.from_numpy(dress(even, bare, np.random.default_rng(1))[..., 0].copy()) / 255 - 0.5


def choose(styles: list[Style], rng: Rng, looks: int, textures: int) -> dict[Kind, list[int]]:
    """Numbers of the styles to keep; for textures none oftener than its share, for half of all styles are flat."""
    order, found = rng.permutation(len(styles)).tolist(), list[int]()
    left = dict.fromkeys(TEXTURE_WORDS, -(-textures // len(TEXTURE_WORDS)))
    for k in order:
        if left[styles[k].texture]:
            left[styles[k].texture] -= 1
            found.append(k)
    return {
        "colours": [order[i % len(order)] for i in range(looks)],
        "texture": [found[i % len(found)] for i in range(textures)],
    }


def _tensor(pictures: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
