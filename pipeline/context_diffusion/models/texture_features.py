"""The textures of an image as numbers: energies of Gabor filters by period and angle.

After Portilla and Simoncelli 2000, first order only. Quantiles of the energies over the image tell textures,
which are nearly everywhere, from a layout's borders, which are few. Every function treats its images one by
one. N images  S pixels"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 64  # pixels a side at which images are measured
PERIODS, ANGLES = (3.0, 4.5, 7.0, 11.0), 6
HALF = 8  # half the side of a filter, pixels
SHARES = (0.2, 0.5, 0.8, 0.95)  # of the places, from the weakest
TEXTURE_STATISTICS = len(PERIODS) * ANGLES * len(SHARES) + 2
FAINT = 0.004  # energies below this are treated alike


@cache
def filters() -> Tensor:
    """Return Gabor filters (2 · periods · angles, 1, 17, 17): cosine and sine by turns; the cosines have no
    mean."""
    with torch.device("cpu"):  # they are cached: not on the default device of the moment, such as `meta`
        return _filters()


def _filters() -> Tensor:
    y, x = torch.meshgrid(*[torch.arange(-HALF, HALF + 1, dtype=torch.float32)] * 2, indexing="ij")
    pairs = []
    for period in PERIODS:
        window = torch.exp(-(x * x + y * y) / (2 * (period / 2) ** 2))
        window = window / window.sum()
        for number in range(ANGLES):
            angle = math.pi * number / ANGLES
            phase = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period
            pairs += [
                (torch.cos(phase) - (window * torch.cos(phase)).sum()) * window,
                torch.sin(phase) * window,
            ]
    return torch.stack(pairs)[:, None]


def fine_of(small: Tensor) -> Tensor:
    """Return the detail of (N, 1, SIDE, SIDE) that is finer than a ninth of an image."""
    return small - F.avg_pool2d(small, 9, 1, 4, count_include_pad=False)


def describe_textures(lightness: Tensor) -> Tensor:
    """Describe lightness (N, 1, S, S) in [0, 1] by (N, TEXTURE_STATISTICS) numbers of about -2 to 2.

    They are quantiles of the energies, then the skewness and strength of the detail finer than a ninth of an
    image: dots are skewed, hatching is not."""
    small = F.adaptive_avg_pool2d(lightness, SIDE)
    padded = F.pad(small, (HALF,) * 4, mode="reflect")
    responses = F.conv2d(padded, filters().to(small), stride=2)
    energies = (responses[:, 0::2].square() + responses[:, 1::2].square()).sqrt().flatten(2).sort(2).values
    at = [int(share * energies.shape[2]) for share in SHARES]
    fine = fine_of(small)
    variance, third = (fine.pow(power).mean((1, 2, 3)) for power in (2, 3))
    rest = torch.stack([third / (variance**1.5 + 1e-5), (variance + 1e-4).log() + 6], 1)
    return torch.cat([1.5 * (energies[:, :, at] + FAINT).log().flatten(1) + 6, rest], 1)
