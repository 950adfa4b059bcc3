"""The ControlNets of a Stable Diffusion: what they read of a row, encoded once, and their residuals at each
step.

P lanes  C h w latents
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from context_diffusion.core.records import Control
from context_diffusion.engine.backbone import Conditions
from context_diffusion.models.attention import LaneInputs, attend_by_lanes, keys_and_values
from context_diffusion.models.conditioning import to_tensor


class ControlNetworks:
    """Run ControlNets beside a U-Net. networks: loaded on their device."""

    def __init__(self, networks: list[Any]) -> None:
        self.networks = networks
        self.layers = [attend_by_lanes(network) for network in networks]
        # They depend on the control maps alone: computed once a row, not once a step.
        self.map_embeddings = [network.controlnet_cond_embedding for network in networks]
        for network in networks:
            network.controlnet_cond_embedding = nn.Identity()

    def __len__(self) -> int:
        return len(self.networks)

    def text(self, hidden: Tensor) -> Conditions:
        """Return the keys and values of each ControlNet's layers for a prompt's hidden states (1, L, D)."""
        return {f"net{n}": keys_and_values(layers, hidden) for n, layers in enumerate(self.layers)}

    def embed(self, n: int, control: Control) -> Tensor:
        """Embed a control map for the ControlNet of its place, (1, C, h, w)."""
        weight = self.networks[n].conv_in.weight
        return self.map_embeddings[n]((to_tensor(control.pixels, weight.device) / 255).to(weight.dtype))

    def residuals(
        self, latents: Tensor, timesteps: Tensor, lanes: Any, added: dict[str, Tensor], control: Any
    ) -> list[Tensor]:
        """Return the sum of the ControlNets' residuals, one a skip connection and the middle one last."""
        total: list[Tensor] = []
        for n, network in enumerate(self.networks):
            down, mid = network(
                latents,
                timesteps,
                encoder_hidden_states=None,
                controlnet_cond=control["maps"][n],
                added_cond_kwargs=added,
                cross_attention_kwargs={"lanes": LaneInputs(lanes[f"net{n}"], lanes.get("bias"))},
                return_dict=False,
            )
            scale = control["scale"][:, n, None, None, None]
            scaled = [residual * scale for residual in (*down, mid)]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return total
