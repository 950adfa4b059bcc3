"""Cross-attention over given keys and values: they are the same at every step of a lane, so computed once.

P lanes  L tokens  D width  J width of a layer's keys  h heads
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

ABSENT = -10_000.0  # exp() of it is exactly 0, so an absent token changes no bit


def log_weights(weights: Tensor) -> Tensor:
    """Return what weights >= 0 add to the attention's logits: their logarithm, ABSENT for 0."""
    return torch.where(weights > 0, weights.clamp(min=1e-4).log(), ABSENT)


class LaneInputs(NamedTuple):
    """What the attention layers of a network read of a chunk's lanes.

    text: the keys and values (P, L, J) of all cross-attention layers, in the order of the network's modules:
    k, v, k, v, ... contexts: the same of an IP-Adapter. bias, context_bias: (P, 1, 1, L), added to the
    logits. context_scale: (P, layers), of each layer; None: no IP-Adapter. context_masks: empty, or for each
    resolution of the network (P, slots, L), the weight of each context at each place: contexts are then
    attended to one by one, not together."""

    text: tuple[Tensor, ...]
    bias: Tensor | None = None
    contexts: tuple[Tensor, ...] = ()
    context_bias: Tensor | None = None
    context_scale: Tensor | None = None
    context_masks: tuple[Tensor, ...] = ()


class SelfAttention:
    """Attend as diffusers' AttnProcessor2_0 does, with one projection for queries, keys and values where the
    layer has it; `lanes` is ignored."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        lanes: LaneInputs | None = None,
    ) -> Tensor:
        if attn.to_q is None:
            parts: Any = attn.to_qkv(hidden_states).chunk(3, 2)
        else:
            parts = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (_heads(part, attn.heads) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return _projected(attn, attended)


class LaneAttention:
    """Attend to keys and values that are given for each lane, those of the layer's place in LaneInputs; and,
    where there are any, to the contexts' own, by the decoupled cross-attention of IP-Adapter (Ye et al. 2023,
    eq. 5)."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        lanes: LaneInputs,
    ) -> Tensor:
        query = _heads(attn.to_q(hidden_states), attn.heads)
        attended = self._attend(query, lanes.text, lanes.bias, attn.heads)
        if lanes.context_scale is not None:
            from_contexts = (
                self._attend_masked(query, lanes, attn.heads)
                if lanes.context_masks
                else self._attend(query, lanes.contexts, lanes.context_bias, attn.heads)
            )
            attended = attended + lanes.context_scale[:, self.place, None, None] * from_contexts
        return _projected(attn, attended)

    def _attend_masked(self, query: Tensor, lanes: LaneInputs, heads: int) -> Tensor:
        """Attend to each context alone, and return the sum (P, L, J), weighted by the masks."""
        [masks] = [masks for masks in lanes.context_masks if masks.shape[2] == query.shape[2]]
        slots = masks.shape[1]
        key, value = (
            _heads(lanes.contexts[2 * self.place + part].unflatten(1, (slots, -1)).flatten(0, 1), heads)
            for part in range(2)
        )
        queries = query[:, None].expand(-1, slots, -1, -1, -1).flatten(0, 1)
        attended = F.scaled_dot_product_attention(queries, key, value)  # (P·slots, h, L, J/h)
        by_slot = attended.transpose(1, 2).flatten(2).unflatten(0, (-1, slots))
        return (by_slot * masks[..., None]).sum(1)

    def _attend(self, query: Tensor, keys: tuple[Tensor, ...], bias: Tensor | None, heads: int) -> Tensor:
        key, value = (_heads(keys[2 * self.place + part], heads) for part in range(2))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attended.transpose(1, 2).flatten(2)


def _projected(attn: Attention, attended: Tensor) -> Tensor:
    output = attn.to_out[1](attn.to_out[0](attended))
    return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """Split tokens (P, L, J) into heads (P, h, L, J/h)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def cross_attentions(model: nn.Module) -> list[Attention]:
    """Return the cross-attention layers of a U-Net or ControlNet in the order of their places."""
    return [layer for name, layer in model.named_modules() if name.endswith("attn2")]


def attend_by_lanes(model: nn.Module, fuse: bool = True) -> list[Attention]:
    """Set the processors of a U-Net or ControlNet, and return its cross-attention layers.

    fuse: project to queries, keys and values of self-attention at once. This cannot be undone: pass a copy of
    a model that is used in another way too."""
    layers = cross_attentions(model)
    for place, layer in enumerate(layers):
        layer.set_processor(LaneAttention(place))
    for name, layer in model.named_modules():
        if name.endswith("attn1"):
            if fuse:
                _fuse(layer)
            layer.set_processor(SelfAttention())
    return layers


def _fuse(layer: Attention) -> None:
    """Replace the three projections of a self-attention by one."""
    layer.to_qkv = fused_projection([layer.to_q, layer.to_k, layer.to_v])
    layer.to_q = layer.to_k = layer.to_v = None


@torch.no_grad()
def fused_projection(parts: list[nn.Linear]) -> nn.Linear:
    """Return one projection whose output is those of the parts, one after the other."""
    first = parts[0]
    fused = nn.Linear(
        first.in_features,
        sum(part.out_features for part in parts),
        bias=first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    fused.weight.copy_(torch.cat([part.weight for part in parts]))
    if first.bias is not None:
        fused.bias.copy_(torch.cat([part.bias for part in parts]))
    return fused.requires_grad_(False)


@torch.no_grad()
def keys_and_values(layers: list[Attention], hidden: Tensor) -> tuple[Tensor, ...]:
    """Compute the keys and values (1, L, J) of each layer for tokens (1, L, D): k, v, k, v, ..."""
    return tuple(project(hidden) for layer in layers for project in (layer.to_k, layer.to_v))
