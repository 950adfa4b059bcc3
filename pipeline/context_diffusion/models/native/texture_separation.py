"""An image's relief: its texture alone, in tones, separated from its layout (structure and texture, after
Meyer 2001). A network learned the separation from images of many kinds of layouts and styles
(training/texture_separation.py).

Every function treats its images one by one. N images  H W pixels
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8  # of normalisation: widths are multiples of it
FOLD = 2  # pixels a side of one place of the network's grid
SMALL = 0.3  # factor of the network's output: what is added to tones is about a third of them
FAINT = 0.02  # std, in ranks, up to which a texture is taken for an error: about that of a flat image


class Block(nn.Module):
    """A residual block that is modulated by the mean over the whole image, since a texture is everywhere."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm_first, self.norm_second = nn.GroupNorm(GROUPS, inputs), nn.GroupNorm(GROUPS, outputs)
        self.first, self.second = (
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.whole = nn.Linear(outputs, outputs)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm_second(self.first(F.silu(self.norm_first(x)))))
        return self.skip(x) + self.second(hidden * (1 + self.whole(hidden.mean((2, 3)))[..., None, None]))


class ReliefModel(ModelMixin, ConfigMixin):
    """A component of the native model, a small U-Net. widths: channels by level, from fine to coarse."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        self.levels = len(widths)
        self.conv_in = nn.Conv2d(2 * FOLD**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            [Block(widths[max(level - 1, 0)], widths[level]) for level in range(self.levels)]
        )
        self.up = nn.ModuleList(
            [Block(widths[k + 1] + widths[k], widths[k]) for k in reversed(range(self.levels - 1))]
        )
        self.norm, self.conv_out = (
            nn.GroupNorm(GROUPS, widths[0]),
            nn.Conv2d(widths[0], 2 * FOLD**2, 3, padding=1),
        )
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def learned(self) -> bool:
        """Whether it has been trained: with fresh weights all of an image is structure."""
        weight = self.conv_out.weight
        return weight.is_meta or bool(weight.any())  # where shapes alone are asked for

    def forward(self, tones: Tensor) -> tuple[Tensor, Tensor]:
        """Separate draft.tones_of's tones (N, 2, H, W) into structure and texture in ranks, (N, H, W) each.
        They do not add up to the tones: a camera's noise and uneven light are neither, nor are outlines."""
        height, width = tones.shape[2:]
        multiple = FOLD * 2 ** (self.levels - 1)
        padded = F.pad(tones.to(self.dtype), (0, -width % multiple, 0, -height % multiple), mode="replicate")
        x, skips = self.conv_in(F.pixel_unshuffle(4 * padded - 2, FOLD)), list[Tensor]()
        for level, block in enumerate(self.down):
            if level:
                skips.append(x)
                x = F.avg_pool2d(x, 2)
            x = block(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], 1))
        parts = F.pixel_shuffle(self.conv_out(F.silu(self.norm(x))), FOLD)[..., :height, :width].float()
        return tones[:, 0] + SMALL * parts[:, 0], SMALL * parts[:, 1]

    def texture(self, tones: Tensor) -> Tensor:
        """Return the texture (N, H, W) of tones (N, 2, H, W), about 0; faint texture is removed (shrinkage as
        in Wiener's filter)."""
        texture = self(tones)[1]
        std = texture.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        return (1 - (FAINT / std).square()).clamp(min=0) * (texture - texture.mean((1, 2), keepdim=True))
