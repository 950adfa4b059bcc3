"""The losses. B samples, C h w latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def image_loss(decoded: Tensor, true: Tensor) -> Tensor:
    """Return the autoencoder's loss, both images (B, 3, H, W) in [-1, 1].

    It sums L1, L1 of the gradients, squares, and squares of the mean colours of 8 x 8 blocks, without which
    hues were lost for the sake of edges. L1 and gradients count once more, weighted by the contrast around a
    pixel, which decides how visible an error is (contrast masking, Foley 1994): otherwise faint textures are
    lost."""
    error = decoded - true
    weight = local_weight(true)
    loss = (
        error.abs().mean()
        + error.square().mean()
        + F.avg_pool2d(error, 8).square().mean()
        + (error.abs() * weight).mean()
    )
    for axis in (2, 3):
        steps = error.diff(dim=axis).abs()
        loss = loss + steps.mean() + (steps * weight.narrow(axis, 1, weight.shape[axis] - 1)).mean()
    return loss


def local_weight(true: Tensor, window: int = 11) -> Tensor:
    """Return weights (B, 1, H, W), at most 3, smaller where lightness varies much within the window."""
    lightness = true.mean(1, keepdim=True)
    mean, square = (
        F.avg_pool2d(part, window, 1, window // 2, count_include_pad=False)
        for part in (lightness, lightness.square())
    )
    return 0.3 / ((square - mean.square()).clamp(min=0).sqrt() + 0.1)


def spread_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep from each of `count` parts of the range: (count,), in random order.

    More of them have much noise, where contexts and query decide the image."""
    parts = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (parts**0.7 * timesteps).long().clamp(max=timesteps - 1)


def rest_timesteps(count: int, alphas: Tensor, rest: float, generator: torch.Generator) -> Tensor:
    """Draw timesteps (count,) at which a residual of variance `rest` can be learned.

    The logarithm of noise over signal is normal around half an e below the residual's std (Karras et al.
    2022; with their figures, a little wider)."""
    parts = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    wanted = torch.special.ndtri(parts.clamp(1e-4, 1 - 1e-4)) * 1.4 - 0.5 + 0.5 * math.log(rest)
    return torch.searchsorted(((1 - alphas) / alphas).log() / 2, wanted).clamp(max=len(alphas) - 1)


def noised(latents: Tensor, noise: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_t, v) of v-prediction (Salimans and Ho 2022): x = a·x0 + s·noise, v = a·noise - s·x0. alphas:
    (B,)."""
    signal, sigma = (value.view(-1, 1, 1, 1) for value in (alphas.sqrt(), (1 - alphas).sqrt()))
    return signal * latents + sigma * noise, signal * noise - sigma * latents


def v_loss(
    output: Tensor, target: Tensor, alphas: Tensor, min_snr: float, has_draft: Tensor, rest: float
) -> Tensor:
    """Return the squared error of v, weighted by min(1, gamma / (SNR + 1)).

    This is min-SNR's weight (Hang et al. 2023) for little noise, but 1 for much noise, where v is the image
    itself and the contexts decide it. Rows with a draft (`has_draft`, bool (B,)) are weighted by the inverse
    of the squared gain of models/native/preconditioning.py, so that the U-Net's output has the same weight at
    each noise: otherwise it learns where there is nothing to learn, and blurs."""
    snr = alphas / (1 - alphas)
    weight = torch.where(has_draft, alphas + (1 - alphas) / rest, (min_snr / (snr + 1)).clamp(max=1))
    return (weight * (output.float() - target).square().mean((1, 2, 3))).mean()


class AuxiliaryHeads(nn.Module):
    """Predict palette and texture from the contexts' tokens. Used in training alone: they give the context
    encoder a signal long before the U-Net attends to contexts."""

    def __init__(self, width: int, textures: int) -> None:
        super().__init__()
        self.palette, self.texture = nn.Linear(width, 8 * 3), nn.Linear(width, textures)

    def forward(self, tokens: Tensor, palettes: Tensor, textures: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of tokens (M, K, D) for palettes (M, 24) and textures (M,), with each context's
        weight (M,)."""
        pooled = tokens.float().mean(1)
        return (weights * (self.palette(pooled) - palettes).square().mean(1)).sum() + 0.1 * (
            weights * F.cross_entropy(self.texture(pooled), textures, reduction="none")
        ).sum()
