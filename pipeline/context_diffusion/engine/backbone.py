"""What the engine asks of a model: encode a row's conditions once, predict for the lanes, decode.

Every method treats its samples one by one: no batch-wide statistic. A lane is one guidance branch of a row.

B samples or lanes  C h w latents  H W pixels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from context_diffusion.core.records import Request
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.inputs.context_images import ContextPreprocessing

Conditions = dict[str, Tensor]  # by name, each (1, ...) for one lane or row, (B, ...) for many


@dataclass(frozen=True)
class Encoded:
    """A row, encoded.

    lanes: what `predict` reads, for each branch. control: the row's encoded control maps; None: it has none.
    control_keys: a key for each lane; lanes with the same key share a call of `control`. control_lanes: what
    `control` reads, for each lane. truncated: the prompt was longer than the model reads. unknown_words: of
    the prompt; None: the model's text encoder reads any word. finish: the model's own last step for this row,
    on its decoded image (1, 3, H, W) in [0, 1]; None: the model has no such step.
    """

    lanes: list[Conditions]
    control: Conditions | None
    control_keys: list[str]
    control_lanes: list[Conditions] = field(default_factory=list)
    truncated: bool = False
    unknown_words: tuple[str, ...] | None = None
    finish: Callable[[Tensor], Tensor] | None = None


class Backbone(Protocol):
    """Knows nothing of slots, steps and schedulers."""

    scheduler_config: dict[str, Any]
    image_size: int  # pixels, the size it was trained for
    contexts: ContextPreprocessing  # how a context image of any size becomes the encoder's pixels
    context_slots: int  # contexts that a row may have
    noise_scale: float  # of the noise that sampling begins with; 1: as trained
    latent_channels: int
    latent_factor: int  # pixels a side of a latent
    tiles: bool  # whether `decode` can work in tiles

    def branches(self, request: Request) -> list[Branch]:
        """Return the guidance branches that the row needs, 1 to 3. Raises RowError for guidance that the
        model lacks."""

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        """Encode the row's prompts, contexts and control maps. Raises RowError for a row that the model
        cannot take."""

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        """The query's latents (1, C, h, w) float32, for image to image; draws what the model's own pipeline
        draws."""

    def control(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, control: Conditions
    ) -> list[Tensor]:
        """-> the ControlNet's residuals, one a skip connection and the middle one last."""

    def predict(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, residuals: list[Tensor] | None
    ) -> Tensor:
        """-> the model's output (B, C, h, w)."""

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Decode one row's latents (1, C, h, w) float32 to an image (1, 3, H, W) in [0, 1].

        tiled: decode in tiles, which takes less memory and changes pixels."""
