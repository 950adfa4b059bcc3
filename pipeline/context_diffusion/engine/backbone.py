"""What the engine asks of a model: encode a row's conditions once, predict for the lanes, decode.

Every method treats its samples one by one: no batch-wide statistic. A lane is one guidance branch of a row.

B samples or lanes  C h w latents  H W pixels
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from context_diffusion.engine.cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.schema import Request

Conditions = dict[str, Tensor]  # by name, each (1, ...) for one lane or row, (B, ...) for many


@dataclass(frozen=True)
class Encoded:
    """A row, encoded. lanes: of each branch. control: of the row, None without. control_keys: of each lane; lanes with
    the same key share a call of the ControlNet. truncated: the prompt was longer than the model reads. kept: for decode."""

    lanes: list[Conditions]
    control: Conditions | None
    control_keys: list[str]
    truncated: bool = False
    kept: Conditions = field(default_factory=dict)


class Backbone(Protocol):
    """Knows nothing of slots, steps and schedulers."""

    scheduler_config: dict[str, Any]
    image_size: int  # pixels, the size it was trained for
    context_size: int  # pixels of a context picture
    context_slots: int  # contexts that a row may have
    noise_scale: float  # of the noise that sampling begins with; 1: as trained
    latent_channels: int
    latent_factor: int  # pixels a side of a latent
    # How the names of the lanes' conditions begin that `predict` and `control` read.
    predict_reads: tuple[str, ...]
    control_reads: tuple[str, ...]
    shares: bool  # whether the lanes of a row have anything in common

    def encode(self, request: Request, wanted: list[Branch], cache: Cache) -> Encoded:
        """Raises RowError for a row that the model cannot take."""

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        """The query's latents (1, C, h, w) float32, for image to image; draws what the model's own pipeline draws."""

    def share(self, latents: Tensor, timesteps: Tensor, control: Conditions | None) -> Conditions:
        """Once a row and step: what its lanes have in common in `predict`, or with `control` in the ControlNet; it comes
        back among their conditions. Asked only of a backbone that `shares`."""

    def control(self, latents: Tensor, timesteps: Tensor, lanes: Conditions, control: Conditions) -> list[Tensor]:
        """-> the ControlNet's residuals, one a skip connection and the middle one last."""

    def predict(self, latents: Tensor, timesteps: Tensor, lanes: Conditions, residuals: list[Tensor] | None) -> Tensor:
        """-> the model's output (B, C, h, w)."""

    def decode(self, latents: Tensor, request: Request, kept: Conditions) -> Tensor:
        """One row's latents (1, C, h, w) float32 -> (1, 3, H, W) in [0, 1]. kept: what `encode` kept for this."""
