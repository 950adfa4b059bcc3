"""A texture of any size from one that was measured: overlapping blocks of it, each beside what continues it.

Of some places that the seed draws, each block is taken from the one that fits best what lies there already
(after Efros and Freeman 2001, with soft seams); windows whose squares add up to 1 keep the strength of a
texture whose blocks are unlike one another.

S side of the measured texture  H W pixels
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

TRIALS = 16  # places of which the best is taken


def synthesise(texture: Tensor, height: int, width: int, seed: int) -> Tensor:
    """Synthesise (H, W) of a texture (S, S) of mean 0."""
    step = min(texture.shape) // 4
    side = 2 * step
    draw = random.Random(seed)
    half = torch.sin((torch.arange(side, device=texture.device) + 0.5) * (torch.pi / side))
    window = half[:, None] * half
    rows, columns = (-(-size // step) + 1 for size in (height, width))
    canvas = texture.new_zeros((rows + 1) * step, (columns + 1) * step)
    for top in range(0, rows * step, step):
        for left in range(0, columns * step, step):
            here = canvas[top : top + side, left : left + side]
            trials = [
                (draw.randint(0, texture.shape[0] - side), draw.randint(0, texture.shape[1] - side))
                for _ in range(TRIALS)
            ]
            blocks = torch.stack([texture[y : y + side, x : x + side] for y, x in trials]) * window
            fits = (blocks * here).mean((1, 2)) / blocks.square().mean((1, 2)).sqrt().clamp(min=1e-6)
            here += blocks[int(fits.argmax())]
    return canvas[step : step + height, step : step + width]
