"""Text and context tokens in one sequence for cross-attention; empty context slots are masked.

B samples  N images  T text tokens  K tokens a context  L = T + slots·K + K null tokens  D width
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from context_diffusion.models.attention import ABSENT, log_weights


class ContextFusion(ModelMixin, ConfigMixin):
    """Project text and context tokens to one sequence, with the removed statistics embedded, and a null
    context.

    width: D of all tokens; vision_width: of the context encoder's tokens; grid: a context becomes grid²
    tokens; statistics: how many numbers of normalization.describe are embedded, 0 for none."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 128, vision_width: int = 128, grid: int = 4, statistics: int = 0) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.project = nn.Sequential(nn.LayerNorm(2 * vision_width), nn.Linear(2 * vision_width, width))
        self.embed = (
            nn.Sequential(nn.Linear(statistics, width), nn.SiLU(), nn.Linear(width, width))
            if statistics
            else None
        )
        self.norm_context, self.norm_text = nn.LayerNorm(width), nn.LayerNorm(width)
        self.null_context = nn.Parameter(torch.randn(grid * grid, width) * 0.02)

    def summarise(self, patches: Tensor) -> Tensor:
        """Summarise patch tokens (N, side², D_v) as (N, K, 2·D_v): mean and std over the patches of each cell
        of the grid.

        Any number of patches; no weights. The std shows textures, the mean colours."""
        side = math.isqrt(patches.shape[1])
        # In half precision the difference of two squares would be noise: pretrained towers have a few huge
        # channels.
        field = patches.float().transpose(1, 2).unflatten(2, (side, side))
        average = self.pool(field)
        spread = (self.pool(field.square()) - average.square()).clamp(min=1e-6).sqrt()
        return torch.cat([average, spread], 1).flatten(2).transpose(1, 2)

    def encode(self, summaries: Tensor, statistics: Tensor) -> Tensor:
        """Encode summaries (N, K, 2·D_v) and each image's own statistics (N, statistics) to tokens (N, K,
        D)."""
        tokens = self.project(summaries.to(self.dtype))
        if self.embed is not None:
            tokens = tokens + self.embed(statistics.to(tokens.dtype))[:, None]
        return self.norm_context(tokens)

    def forward(
        self, text: Tensor, text_mask: Tensor, contexts: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Join text (B, T, D), mask (B, T) bool, and contexts (B, slots, K, D), weights (B, slots) >= 0.

        Returns tokens (B, L, D) and an additive bias (B, 1, L): log(weight) for a context's tokens, ABSENT
        for empty slots. Where all weights are 0, the null-context tokens are attended instead."""
        batch, _, per_context, _ = contexts.shape
        null = self.null_context.expand(batch, -1, -1)
        tokens = torch.cat([self.norm_text(text), contexts.flatten(1, 2), null], 1)
        weights = weights.float()
        given = log_weights(weights)
        none = torch.where((weights > 0).any(1, keepdim=True), ABSENT, 0.0)
        bias = torch.cat(
            [
                torch.where(text_mask, 0.0, ABSENT),
                given.repeat_interleave(per_context, 1),
                none.expand(-1, null.shape[1]),
            ],
            1,
        )
        return tokens, bias[:, None]
