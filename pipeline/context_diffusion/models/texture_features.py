"""What textures a picture has, as numbers: energies of Gabor filters by period and angle (after Portilla and Simoncelli
2000, first order only), at places from weak to strong: a texture is nearly everywhere, a layout's borders are few.

Every function treats its pictures one by one. N pictures  S pixels
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels that a picture is looked at with
PERIODS, ANGLES = (3.0, 4.5, 7.0, 11.0), 6
HALF = 8  # of a filter, pixels
SHARES = (0.2, 0.5, 0.8, 0.95)  # of the places, from the weakest
TEXTURE_STATISTICS = len(PERIODS) * ANGLES * len(SHARES) + 2
FAINT = 0.004  # energy below which nothing is told apart


@cache
def filters() -> Tensor:
    """(2 · periods · angles, 1, 17, 17): cosine, sine in turn under a Gaussian; the cosines have no mean."""
    with torch.device("cpu"):  # they are kept: not as whatever device is the default just now, `meta` say
        return _filters()


def _filters() -> Tensor:
    y, x = torch.meshgrid(*[torch.arange(-HALF, HALF + 1, dtype=torch.float32)] * 2, indexing="ij")
    made = []
    for period in PERIODS:
        window = torch.exp(-(x * x + y * y) / (2 * (period / 2) ** 2))
        window = window / window.sum()
        for number in range(ANGLES):
            angle = math.pi * number / ANGLES
            phase = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period
            made += [(torch.cos(phase) - (window * torch.cos(phase)).sum()) * window, torch.sin(phase) * window]
    return torch.stack(made)[:, None]


def fine_of(small: Tensor) -> Tensor:
    """(N, 1, SIDE, SIDE): what is finer than a ninth of a picture."""
    return small - F.avg_pool2d(small, 9, 1, 4, count_include_pad=False)


def describe_textures(lightness: Tensor) -> Tensor:
    """(N, 1, S, S) in [0, 1] -> (N, TEXTURE_STATISTICS), about -2 to 2: the energies, and the skewness and strength of
    what is finer than a ninth of a picture: dots stand out of their ground, hatching lies in it."""
    small = F.adaptive_avg_pool2d(lightness, SIDE)
    padded = F.pad(small, (HALF,) * 4, mode="reflect")
    found = F.conv2d(padded, filters().to(small), stride=2)
    energies = (found[:, 0::2].square() + found[:, 1::2].square()).sqrt().flatten(2).sort(2).values
    at = [int(share * energies.shape[2]) for share in SHARES]
    fine = fine_of(small)
    variance, third = (fine.pow(power).mean((1, 2, 3)) for power in (2, 3))
    rest = torch.stack([third / (variance**1.5 + 1e-5), (variance + 1e-4).log() + 6], 1)
    return torch.cat([1.5 * (energies[:, :, at] + FAINT).log().flatten(1) + 6, rest], 1)
