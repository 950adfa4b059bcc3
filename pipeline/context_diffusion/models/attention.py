"""Cross-attention that is given its keys and values: they are the same at every step of a lane, so made once.

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
    """Weights >= 0 -> what is added to the attention's logits: their logarithm, ABSENT for 0."""
    return torch.where(weights > 0, weights.clamp(min=1e-4).log(), ABSENT)


class SelfAttention(AttnProcessor2_0):
    """diffusers' own; the lanes are none of its business."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, lanes: Any = None, **kwargs: Any) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs)


class LaneAttention:
    """Cross-attention to `lanes[NAME.k]` and `lanes[NAME.v]` (P, L, J) with the bias lanes["bias"] (P, 1, 1, L); and to
    the contexts' own keys and values, NAME.context_k and .context_v, by lanes["context_scale"] (P, 1, 1), where there
    are any: the decoupled cross-attention of IP-Adapter (Ye et al. 2023, eq. 5)."""

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
        made = self._attend(query, lanes, "", attn.heads)
        if f"{self.name}.context_k" in lanes:
            made = made + lanes["context_scale"] * self._attend(query, lanes, "context_", attn.heads)
        return attn.to_out[1](attn.to_out[0](made)) / attn.rescale_output_factor

    def _attend(self, query: Tensor, lanes: dict[str, Tensor], what: str, heads: int) -> Tensor:
        key, value = (_heads(lanes[f"{self.name}.{what}{part}"], heads) for part in "kv")
        made = F.scaled_dot_product_attention(query, key, value, attn_mask=lanes.get(f"{what}bias"))
        return made.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """(P, L, J) -> (P, h, L, J/h)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def cross_attentions(model: nn.Module, prefix: str = "") -> dict[str, Attention]:
    """The cross-attention layers by name."""
    return {prefix + name: layer for name, layer in model.named_modules() if name.endswith("attn2")}


def attend_by_lanes(model: nn.Module, prefix: str = "") -> dict[str, Attention]:
    """Sets the processors of a U-Net or ControlNet; -> its cross-attention layers by name. Not to be undone: a copy, where
    the model is used otherwise."""
    layers = cross_attentions(model, prefix)
    for name, layer in model.named_modules():
        if isinstance(layer, Attention) and name.endswith(("attn1", "attn2")):
            layer.set_processor(LaneAttention(prefix + name) if name.endswith("attn2") else SelfAttention())
    return layers


@torch.no_grad()
def keys_and_values(layers: dict[str, Attention], hidden: Tensor) -> dict[str, Tensor]:
    """Tokens (1, L, D) -> NAME.k and NAME.v of each layer, (1, L, J)."""
    found = {}
    for name, layer in layers.items():
        found[f"{name}.k"], found[f"{name}.v"] = layer.to_k(hidden), layer.to_v(hidden)
    return found
