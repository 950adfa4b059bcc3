"""Cross-attention over given keys and values: they are the same at every step of a lane, so computed once.

P lanes  L tokens  D width  J width of a layer's keys  h heads
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

ABSENT = -10_000.0  # exp() of it is exactly 0, so an absent token changes no bit


def log_weights(weights: Tensor) -> Tensor:
    """Return what weights >= 0 add to the attention's logits: their logarithm, ABSENT for 0."""
    return torch.where(weights > 0, weights.clamp(min=1e-4).log(), ABSENT)


class SelfAttention(AttnProcessor2_0):
    """Attend as diffusers' own processor does; `lanes` is ignored."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *args: Any, lanes: Any = None, **kwargs: Any
    ) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs)


class LaneAttention:
    """Attend to `lanes[NAME.k]` and `lanes[NAME.v]` (P, L, J) with the bias lanes["bias"] (P, 1, 1, L); and
    to the contexts' own keys and values, NAME.context_k and .context_v, by lanes["context_scale"] (P, 1, 1),
    where there are any: the decoupled cross-attention of IP-Adapter (Ye et al. 2023, eq. 5)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        lanes: dict[str, Tensor],
    ) -> Tensor:
        query = _heads(attn.to_q(hidden_states), attn.heads)
        attended = self._attend(query, lanes, "", attn.heads)
        if f"{self.name}.context_k" in lanes:
            attended = attended + lanes["context_scale"] * self._attend(query, lanes, "context_", attn.heads)
        return attn.to_out[1](attn.to_out[0](attended)) / attn.rescale_output_factor

    def _attend(self, query: Tensor, lanes: dict[str, Tensor], what: str, heads: int) -> Tensor:
        key, value = (_heads(lanes[f"{self.name}.{what}{part}"], heads) for part in "kv")
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=lanes.get(f"{what}bias"))
        return attended.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """Split tokens (P, L, J) into heads (P, h, L, J/h)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def cross_attentions(model: nn.Module, prefix: str = "") -> dict[str, Attention]:
    """Return the cross-attention layers by name."""
    return {prefix + name: layer for name, layer in model.named_modules() if name.endswith("attn2")}


def attend_by_lanes(model: nn.Module, prefix: str = "") -> dict[str, Attention]:
    """Set the processors of a U-Net or ControlNet, and return its cross-attention layers by name.

    This cannot be undone: pass a copy of a model that is used in another way too."""
    layers = cross_attentions(model, prefix)
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and name.endswith(("attn1", "attn2")):
            layer.set_processor(LaneAttention(prefix + name) if name.endswith("attn2") else SelfAttention())
    return layers


@torch.no_grad()
def keys_and_values(layers: dict[str, Attention], hidden: Tensor) -> dict[str, Tensor]:
    """Compute the keys NAME.k and values NAME.v (1, L, J) of each layer for tokens (1, L, D)."""
    conditions = {}
    for name, layer in layers.items():
        conditions[f"{name}.k"] = layer.to_k(hidden)
        conditions[f"{name}.v"] = layer.to_v(hidden)
    return conditions
