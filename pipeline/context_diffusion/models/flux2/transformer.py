"""The FLUX.2 transformer over lanes, of which each has its own references, positions and mask.

The modules and weights are diffusers'. Its own forward has one set of positions for a whole batch, so rows
whose references have different sizes could not share a call.

P lanes  S tokens: L of the text, T of the output, R of the references  h heads  D width of a head
J width of all heads  C channels of a token
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.models.attention import fused_projection


class LaneTokens(NamedTuple):
    """What a step reads of a chunk's lanes.

    text: (P, L, J), embedded. references: (P, R, C). cos, sin: (P, S, 1, D), see `rotation`. bias: (P, 1, 1,
    S), added to the attention's logits; None: nothing is."""

    text: Tensor
    references: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor | None


def rotation(transformer: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotary embedding of positions (S, 4) as cos and sin (S, 1, D) float32. Every other sin is
    negative: what it is multiplied with are the two halves of a pair in swapped places."""
    cos, sin = transformer.pos_embed(ids)
    sign = torch.tensor([-1.0, 1.0], device=sin.device).repeat(sin.shape[1] // 2)
    return cos[:, None], (sin * sign)[:, None]


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding to tokens (P, S, h, D), in float32."""
    swapped = tokens.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(tokens * cos, swapped, sin).to(tokens.dtype)


def prepare(transformer: Any) -> None:
    """Set the attention processors and fuse the projections of a Flux2Transformer2DModel.

    This cannot be undone: pass a copy of a model that is used in another way too."""
    for block in transformer.transformer_blocks:
        attention = block.attn
        attention.to_qkv = fused_projection([attention.to_q, attention.to_k, attention.to_v])
        attention.to_added_qkv = fused_projection(
            [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        )
        attention.to_q = attention.to_k = attention.to_v = None
        attention.add_q_proj = attention.add_k_proj = attention.add_v_proj = None
        attention.set_processor(JointAttention())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(ParallelAttention())


def predict(transformer: Any, latents: Tensor, timesteps: Tensor, lanes: LaneTokens) -> Tensor:
    """Return the transformer's output (P, T, C) for the output's tokens (P, T, C) at timesteps (P,), 0 to
    1000."""
    dtype = latents.dtype
    # diffusers rounds the timestep to the dtype before and after it divides by 1000.
    time = transformer.time_guidance_embed((timesteps.to(dtype) / 1000) * 1000, None)
    for_images, for_text, for_single = (
        modulation(time)
        for modulation in (
            transformer.double_stream_modulation_img,
            transformer.double_stream_modulation_txt,
            transformer.single_stream_modulation,
        )
    )
    rope = lanes.cos, lanes.sin
    attention = {} if lanes.bias is None else {"attention_mask": lanes.bias}
    text, images = lanes.text, transformer.x_embedder(torch.cat([latents, lanes.references], 1))
    for block in transformer.transformer_blocks:
        text, images = block(images, text, for_images, for_text, rope, attention)
    tokens = torch.cat([text, images], 1)
    for block in transformer.single_transformer_blocks:
        tokens = block(tokens, None, for_single, rope, attention)
    start = text.shape[1]
    output = tokens[:, start : start + latents.shape[1]]
    return transformer.proj_out(transformer.norm_out(output, time))


class JointAttention:
    """Attend in a double block, from text and images to both: diffusers' Flux2AttnProcessor with fused
    projections and positions by lane."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        streams: Any = (
            (attn.to_added_qkv, encoder_hidden_states, attn.norm_added_q, attn.norm_added_k),
            (attn.to_qkv, hidden_states, attn.norm_q, attn.norm_k),
        )
        parts = []
        for project, states, norm_q, norm_k in streams:
            query, key, value = project(states).unflatten(-1, (3, attn.heads, -1)).unbind(2)
            parts.append((norm_q(query), norm_k(key), value))
        query, key, value = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        attended = _attend(query, key, value, image_rotary_emb, attention_mask)
        text, images = attended.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        module: Any = attn
        return module.to_out[1](module.to_out[0](images)), module.to_add_out(text)


class ParallelAttention:
    """Attend in a single block, beside its feed-forward part: diffusers' Flux2ParallelSelfAttnProcessor with
    positions by lane."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        module: Any = attn
        projected = module.to_qkv_mlp_proj(hidden_states)
        qkv, hidden = projected.split_with_sizes(
            [3 * module.inner_dim, projected.shape[-1] - 3 * module.inner_dim], -1
        )
        query, key, value = qkv.unflatten(-1, (3, module.heads, -1)).unbind(2)
        attended = _attend(module.norm_q(query), module.norm_k(key), value, image_rotary_emb, attention_mask)
        return module.to_out(torch.cat([attended, module.mlp_act_fn(hidden)], -1))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None
) -> Tensor:
    """Rotate and attend: (P, S, h, D) each to (P, S, J)."""
    assert rope is not None, "`predict` gives it"
    query, key = rotate(torch.cat([query, key], 2), *rope).chunk(2, 2)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)
