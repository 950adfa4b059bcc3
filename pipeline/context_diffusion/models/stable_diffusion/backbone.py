"""Stable Diffusion with ControlNets and an IP-Adapter as the engine's backbone.

Each row equals what diffusers' own pipeline generates for it alone.

B lanes  T text tokens  K tokens a context  D width  C h w latents
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Pixels, Request
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.inputs.context_images import ContextPreprocessing, ImageProcessor
from context_diffusion.models.attention import (
    ABSENT,
    LaneInputs,
    attend_by_lanes,
    cross_attentions,
    keys_and_values,
    log_weights,
)
from context_diffusion.models.conditioning import (
    control_scales,
    latent_size,
    to_tensor,
    weighted_contexts,
)
from context_diffusion.models.normalization import normalise
from context_diffusion.models.stable_diffusion.control_networks import ControlNetworks
from context_diffusion.models.stable_diffusion.loading import StableDiffusion
from context_diffusion.models.stable_diffusion.prompts import PromptEncoder


class StableBackbone:
    """Implement engine/backbone.py. contexts: the image encoder's preprocessing."""

    def __init__(self, model: StableDiffusion, contexts: ImageProcessor) -> None:
        pipe = model.pipe
        self.model = model
        self.unet = pipe.unet
        self.vae = pipe.vae
        self.text = PromptEncoder(pipe, model.xl, model.parts.clip_skip, model.parts.prompt_chunks)
        adapted = pipe.unet.config.encoder_hid_dim_type
        self.encoder = _ContextEncoder(pipe, contexts, model.parts.normalization) if adapted else None
        self.layers = attend_by_lanes(self.unet)
        self.controlnets = ControlNetworks(model.controlnets, model.depth)
        for network in (*self.denoisers, self.vae):
            network.to(memory_format=torch.channels_last)
        # An LCM's U-Net reads the guidance scale as a number, so one lane replaces both branches.
        self.guidance_width: int | None = self.unet.config.time_cond_proj_dim
        self.scheduler_config: dict[str, Any] = dict(pipe.scheduler.config)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size = self.unet.config.sample_size * self.latent_factor
        self.contexts: ContextPreprocessing = contexts
        self.tiles = True
        self.context_slots = 8
        self.noise_scale = 1.0

    @property
    def denoisers(self) -> list[nn.Module]:
        return [self.unet, *self.controlnets.networks]

    @property
    def device(self) -> torch.device:
        return self.unet.conv_out.weight.device  # diffusers' own property goes through all weights: over 1 ms

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_out.weight.dtype

    def branches(self, request: Request) -> list[Branch]:
        settings = request.settings
        if self.guidance_width is None:
            differs = self.text.key(request.prompt, False) != self.text.key(request.negative_prompt, True)
            return guidance_branches(settings, differs)
        if settings.context_guidance_scale not in (None, settings.guidance_scale):
            message = (
                "context_guidance_scale: this model reads one guidance scale, for prompt and contexts "
                "together; leave it out, and set context_scale for the contexts' strength"
            )
            raise RowError(ErrorCode.INVALID_SETTING, message)
        return [Branch(1.0, contexts=True, prompt=True)]

    def shape_group(self, request: Request) -> tuple[int, ...]:
        return self.latent_shape(request)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.vae.config.latent_channels, *latent_size(request, self.latent_factor)

    def schedule(self, request: Request) -> dict[str, Any]:
        return {}

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        contexts = {branch.contexts: self._contexts(request, branch.contexts, cache) for branch in branches}
        both = self._time_ids(request) | self._guidance(request)
        lanes: list[Conditions] = []
        truncated = False
        for branch in branches:
            prompt, negative = (request.prompt, False) if branch.prompt else (request.negative_prompt, True)
            key = f"text:{self.text.key(prompt, negative)}"
            text, cut = cache.get(key, partial(self._text, prompt, negative))
            truncated |= cut
            lanes.append(text | contexts[branch.contexts] | both)
        return Encoded(lanes, self._control_maps(request, cache), truncated)

    def _text(self, prompt: str | None, negative: bool) -> tuple[Conditions, bool]:
        """Encode a prompt to the keys and values of all layers, and return whether it was truncated."""
        hidden, pooled, mask = self.text(prompt, negative)
        conditions: Conditions = {"text": keys_and_values(self.layers, hidden)}
        conditions |= self.controlnets.text(hidden)
        if pooled is not None:
            conditions["text_embeds"] = pooled
        if self.text.chunks > 1:
            conditions["bias"] = torch.where(mask, 0.0, ABSENT)[:, None, None].to(hidden.dtype)
        return conditions, self.text.truncates(prompt)

    def _contexts(self, request: Request, present: bool, cache: Cache) -> Conditions:
        """Encode the contexts of a branch. A branch without them gets an empty image's features.

        What is cached is one context's own; it is padded to the row's slots here."""
        if self.encoder is None:
            return {}
        scale = request.settings.context_scale
        contexts = weighted_contexts(request, self.context_slots)
        none = cache.get("context:", partial(self.encoder.keys_and_values, None))
        if not present:
            return self._slots([none], [1.0], scale)
        keys = [
            cache.get(f"context:{context.key}", partial(self.encoder.keys_and_values, context.pixels))
            for context in contexts
        ]
        return self._slots(keys, [context.weight for context in contexts], scale)

    def _slots(self, keys: list[tuple[Tensor, ...]], weights: list[float], scale: float) -> Conditions:
        """Join the keys and values (1, K, J) of each context to (1, slots·K, J); zeros fill the rest."""
        empty = self.context_slots - len(keys)
        joined = tuple(
            F.pad(torch.cat(parts, 1), (0, 0, 0, empty * parts[0].shape[1]))
            for parts in zip(*keys, strict=True)
        )
        given = torch.tensor([*weights, *[0.0] * empty])
        bias = log_weights(given).repeat_interleave(keys[0][0].shape[1])[None, None, None]
        strength = scale if any(weights) else 0.0
        return {
            "contexts": joined,
            "context_bias": pinned(bias, self.device).to(self.dtype),
            "context_scale": joined[0].new_full((1, 1, 1), strength),
        }

    def _time_ids(self, request: Request) -> Conditions:
        if not self.model.xl:
            return {}
        width, height = request.output_size
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        return {"time_ids": pinned(sizes, self.device).to(self.dtype)}

    def _guidance(self, request: Request) -> Conditions:
        """Embed the guidance scale, (1, guidance_width), as diffusers' pipelines do for an LCM."""
        if self.guidance_width is None:
            return {}
        scale = torch.tensor([request.settings.guidance_scale - 1])
        embedded = self.model.pipe.get_guidance_scale_embedding(scale, embedding_dim=self.guidance_width)
        return {"guidance": pinned(embedded, self.device).to(self.dtype)}

    def _control_maps(self, request: Request, cache: Cache) -> Conditions | None:
        if not request.controls:
            return None
        scales = control_scales(request, len(self.controlnets))
        scale = pinned(torch.tensor([scales]), self.device).to(self.dtype)
        return self.controlnets.maps(request, cache) | {"scale": scale}

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        pixels = to_tensor(request.query, self.device) / 255 * 2 - 1
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.sample(generator)
        return (latents * self.vae.config.scaling_factor).float()

    def predict(self, latents: Tensor, timesteps: Tensor, lanes: Any, control: Any) -> Tensor:
        latents = latents.to(self.dtype)
        added = {name: lanes[name] for name in ("text_embeds", "time_ids") if name in lanes}
        residuals = None
        if control is not None:
            residuals = self.controlnets.residuals(latents, timesteps, lanes, added, control)
        inputs = LaneInputs(
            lanes["text"],
            lanes.get("bias"),
            lanes.get("contexts", ()),
            lanes.get("context_bias"),
            lanes.get("context_scale"),
        )
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=None,
            timestep_cond=lanes.get("guidance"),
            added_cond_kwargs=added,
            cross_attention_kwargs={"lanes": inputs},
            down_block_additional_residuals=None if residuals is None else tuple(residuals[:-1]),
            mid_block_additional_residual=None if residuals is None else residuals[-1],
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decode = self.vae.tiled_decode if tiled else self.vae.decode
        images = decode(scaled, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)


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
