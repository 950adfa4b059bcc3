"""A row's contexts as the keys and values of an IP-Adapter, with the scale of each layer and the mask of each
context.

K tokens a context  D width  J width of a layer's keys  H W pixels  h w latents
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.core.records import Pixels, Request
from context_diffusion.engine.backbone import Conditions
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.inputs.context_images import ImageProcessor
from context_diffusion.models.attention import cross_attentions, log_weights
from context_diffusion.models.conditioning import to_tensor, weighted_contexts
from context_diffusion.models.normalization import normalise
from context_diffusion.models.resolution.context_blocks import ContextBlocks, context_blocks
from context_diffusion.models.resolution.defaults import CONTEXT_SLOTS


class ContextConditions:
    """Encode rows' contexts. pipe: of diffusers, with the IP-Adapter in its U-Net, out of which it is taken.

    levels: resolutions of the U-Net."""

    def __init__(self, pipe: Any, preprocessing: ImageProcessor, normalization: Any, xl: bool) -> None:
        config = pipe.unet.config
        self.encoder = _ContextEncoder(pipe, preprocessing, normalization)
        self.blocks: ContextBlocks = context_blocks(config, xl)
        self.transformers = [
            name.partition(".transformer_blocks")[0]
            for name, _ in pipe.unet.named_modules()
            if name.endswith("attn2")
        ]
        self.levels = len(config.block_out_channels)

    def __call__(self, request: Request, size: tuple[int, int], present: bool, cache: Cache) -> Conditions:
        """Encode the contexts of a guidance branch. A branch without them gets an empty image's features.

        size: height and width of the latents. What is cached is one context's own; it is padded to the row's
        slots here."""
        contexts = weighted_contexts(request, CONTEXT_SLOTS)
        weights = [context.weight for context in contexts]
        none = cache.get("context:", partial(self.encoder.keys_and_values, None))
        keys = [
            cache.get(f"context:{context.key}", partial(self.encoder.keys_and_values, context.pixels))
            if present
            else none
            for context in contexts
        ]
        masks = [context.mask for context in contexts if context.mask is not None]
        conditions = {"context_scale": self._scales(request, any(weights))}
        if masks:
            return conditions | self._joined(keys) | self._masks(masks, weights, size)
        if not present:
            keys, weights = [none], [1.0]
        return conditions | self._joined(keys) | self._bias(weights, keys[0][0].shape[1])

    def _joined(self, keys: list[tuple[Tensor, ...]]) -> Conditions:
        """Join the keys and values (1, K, J) of each context to (1, S·K, J), S: CONTEXT_SLOTS; zeros fill the
        rest."""
        empty = CONTEXT_SLOTS - len(keys)
        joined = tuple(
            F.pad(torch.cat(parts, 1), (0, 0, 0, empty * parts[0].shape[1]))
            for parts in zip(*keys, strict=True)
        )
        return {"contexts": joined}

    def _bias(self, weights: list[float], tokens: int) -> Conditions:
        """Return the logarithm of each token's weight, (1, 1, 1, CONTEXT_SLOTS·K)."""
        given = torch.tensor([*weights, *[0.0] * (CONTEXT_SLOTS - len(weights))])
        bias = log_weights(given).repeat_interleave(tokens)[None, None, None]
        return {"context_bias": self._on_device(bias)}

    def _scales(self, request: Request, weighted: bool) -> Tensor:
        """Return the scale of each layer, (1, layers). weighted: some context's weight is not 0."""
        settings = request.settings
        by_block = self.blocks.scales(settings.context_blocks)
        strength = settings.context_scale if weighted else 0.0
        scales = torch.tensor([[by_block[name] * strength for name in self.transformers]])
        return self._on_device(scales)

    def _masks(self, masks: list[Pixels], weights: list[float], size: tuple[int, int]) -> Conditions:
        """Return each context's weight at each place of each resolution, (1, CONTEXT_SLOTS, L), as diffusers'
        IPAdapterMaskProcessor scales masks."""
        pixels = torch.stack([torch.from_numpy(mask[..., 0] >= 128) for mask in masks])[None].float()
        weight = torch.tensor(weights)[:, None, None]
        levels: dict[int, Tensor] = {}
        height, width = size
        for _ in range(self.levels):
            scaled = F.interpolate(pixels, (height, width), mode="bicubic") * weight
            filled = F.pad(scaled.flatten(2), (0, 0, 0, CONTEXT_SLOTS - len(masks)))
            levels.setdefault(height * width, self._on_device(filled))
            height, width = (height + 1) // 2, (width + 1) // 2
        return {"context_masks": tuple(levels.values())}

    def _on_device(self, values: Tensor) -> Tensor:
        return pinned(values, self.encoder.device).to(self.encoder.keys_dtype)


class _ContextEncoder:
    """The image encoder, and the IP-Adapter's parts taken out of the U-Net, which would run them at every
    step."""

    def __init__(self, pipe: Any, preprocessing: ImageProcessor, normalization: Any) -> None:
        self.encoder = pipe.image_encoder
        self.normalization = normalization
        self.scale = preprocessing.scale
        [self.project] = pipe.unet.encoder_hid_proj.image_projection_layers
        self.keys = [
            part[0]
            for layer in cross_attentions(pipe.unet)
            for part in (layer.processor.to_k_ip, layer.processor.to_v_ip)
        ]
        self.device, self.keys_dtype = self.keys[0].weight.device, self.keys[0].weight.dtype
        pipe.unet.encoder_hid_proj = None
        pipe.unet.register_to_config(encoder_hid_dim_type=None)
        self.mean, self.std = (
            torch.tensor(part, device=self.encoder.device)[:, None, None]
            for part in (preprocessing.mean, preprocessing.std)
        )

    def keys_and_values(self, pixels: Pixels | None) -> tuple[Tensor, ...]:
        """Return the keys and values (1, K, J) of all layers for a context, uint8 (S, S, 3), or for none."""
        tokens = self._empty() if pixels is None else self._encode(pixels)
        return tuple(key(tokens) for key in self.keys)

    def _encode(self, pixels: Pixels) -> Tensor:
        """Encode a context to tokens (1, K, D)."""
        image = to_tensor(pixels, self.encoder.device)
        if self.normalization == "none":
            values = (image * self.scale - self.mean) / self.std
        else:
            values, _, _ = normalise(image, self.normalization)
        return self._features(values.to(self.encoder.dtype), empty=False)

    def _empty(self) -> Tensor:
        side = self.encoder.config.image_size
        return self._features(
            torch.zeros(1, 3, side, side, device=self.encoder.device, dtype=self.encoder.dtype), empty=True
        )

    def _features(self, values: Tensor, empty: bool) -> Tensor:
        """Return the adapter's tokens: a plain one reads the projected embedding, Plus the patches; `empty`:
        of no context."""
        if isinstance(self.project, ImageProjection):
            embeds = self.encoder(values).image_embeds
            return self.project(torch.zeros_like(embeds) if empty else embeds)
        return self.project(self.encoder(values, output_hidden_states=True).hidden_states[-2])
