"""What the engine asks of a model. Every method treats its samples one by one: no batch-wide statistic.

B samples  N pictures  T text tokens  K tokens a context  L all tokens  D width  C h w latents  H W pixels
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Backbone(Protocol):
    scheduler_config: dict[str, Any]
    image_size: int  # pixels, the size it was trained for
    context_size: int  # pixels of a context picture
    context_slots: int  # contexts that a row may have
    noise_scale: float  # of the noise that sampling begins with; 1: as trained

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) at image_size."""

    def encode_text(self, prompts: list[str | None]) -> tuple[Tensor, Tensor]:
        """-> (B, T, D) tokens and (B, T) bool mask."""

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) -> (N, K, D)."""

    def fuse(self, text: Tensor, text_mask: Tensor, contexts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(B, slots, K, D) contexts with (B, slots) weights -> (B, L, D) tokens and (B, 1, L) attention bias."""

    def encode_control(self, control_maps: Tensor, kinds: list[str]) -> Tensor:
        """Control maps uint8 (B, 3, H, W) -> what `control` takes of them, once a row."""

    def control(self, latents: Tensor, timesteps: Tensor, encoded: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encoded control maps -> the ControlNet's residuals: one a skip connection, and the middle one."""

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        bias: Tensor,
        down: list[Tensor] | None,
        mid: Tensor | None,
    ) -> Tensor:
        """-> the U-Net's output (B, C, h, w)."""

    def encode_pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W) in [0, 1]."""

    @property
    def restores(self) -> bool:
        """Whether `restore` does anything."""

    def restore(self, images: Tensor, contexts: Tensor, weights: Tensor) -> Tensor:
        """Decoded pixels (B, 3, H, W) of one row with its contexts, uint8 (M, 3, S, S) and weights (M,): what the model's
        normalisation took from them is given back."""
