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

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Control, Pixels, Request
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.conditioning import (
    content_key,
    control_scales,
    slots_of,
    to_tensor,
    weighted_contexts,
)
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.inputs.context_images import ContextPreprocessing, ImageProcessor
from context_diffusion.models.attention import ABSENT, attend_by_lanes, keys_and_values, log_weights
from context_diffusion.models.normalization import normalise
from context_diffusion.models.stable_diffusion.loading import StableDiffusion
from context_diffusion.models.stable_diffusion.prompts import PromptEncoder

# How the names of the conditions begin that the U-Net and the ControlNets read.
PREDICT_READS = ("unet.", "guidance", "context_", "bias", "text_embeds", "time_ids")
CONTROL_READS = ("net", "bias", "text_embeds", "time_ids")


class StableBackbone:
    """Implement engine/backbone.py. contexts: the image encoder's preprocessing."""

    def __init__(self, model: StableDiffusion, contexts: ImageProcessor) -> None:
        pipe = model.pipe
        self.model = model
        self.unet = pipe.unet
        self.vae = pipe.vae
        self.controlnets = model.controlnets
        self.text = PromptEncoder(pipe, model.xl, model.parts.clip_skip, model.parts.prompt_chunks)
        adapted = pipe.unet.config.encoder_hid_dim_type
        self.encoder = _ContextEncoder(pipe, contexts, model.parts.normalization) if adapted else None
        self.layers = attend_by_lanes(self.unet, "unet.")
        self.control_layers = [attend_by_lanes(net, f"net{n}.") for n, net in enumerate(self.controlnets)]
        # They depend on the control maps alone: computed once a row, not once a step.
        self.map_embeddings = [net.controlnet_cond_embedding for net in self.controlnets]
        for net in self.controlnets:
            net.controlnet_cond_embedding = nn.Identity()
        # An LCM's U-Net reads the guidance scale as a number, so one lane replaces both branches.
        self.guidance_width: int | None = self.unet.config.time_cond_proj_dim
        self.scheduler_config: dict[str, Any] = dict(pipe.scheduler.config)
        self.latent_channels = self.vae.config.latent_channels
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size = self.unet.config.sample_size * self.latent_factor
        self.contexts: ContextPreprocessing = contexts
        self.tiles = True
        self.context_slots = 8
        self.noise_scale = 1.0

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

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        contexts = self._contexts(request, cache)
        both = self._time_ids(request) | self._guidance(request)
        lanes: list[Conditions] = []
        control_lanes: list[Conditions] = []
        keys: list[str] = []
        truncated = False
        for branch in branches:
            prompt, negative = (request.prompt, False) if branch.prompt else (request.negative_prompt, True)
            key = f"text:{self.text.key(prompt, negative)}"
            text, cut = cache.get(key, partial(self._text, prompt, negative))
            truncated |= cut
            lane = text | contexts[branch.contexts] | both
            lanes.append(_named(lane, PREDICT_READS))
            control_lanes.append(_named(lane, CONTROL_READS))
            keys.append(key)
        return Encoded(lanes, self._control(request, cache), keys, control_lanes, truncated)

    def _text(self, prompt: str | None, negative: bool) -> tuple[Conditions, bool]:
        """Encode a prompt to the keys and values of all layers, and return whether it was truncated."""
        hidden, pooled, mask = self.text(prompt, negative)
        conditions: Conditions = {}
        for layers in (self.layers, *self.control_layers):
            conditions |= keys_and_values(layers, hidden)
        if pooled is not None:
            conditions["text_embeds"] = pooled
        if self.text.chunks > 1:
            conditions["bias"] = torch.where(mask, 0.0, ABSENT)[:, None, None].to(hidden.dtype)
        return conditions, self.text.truncates(prompt)

    def _contexts(self, request: Request, cache: Cache) -> dict[bool, Conditions]:
        """Encode the contexts, for branches with and without them: without, the IP-Adapter gets an empty
        image's features."""
        if self.encoder is None:
            return {False: {}, True: {}}
        contexts = weighted_contexts(request, self.context_slots)
        given = [
            cache.get(f"context:{context.key}", partial(self.encoder.encode, context.pixels))
            for context in contexts
        ]
        given_weights = [context.weight for context in contexts]
        none = cache.get("context:", self.encoder.none)
        scale = none.new_full((1, 1, 1), request.settings.context_scale)
        conditions: dict[bool, Conditions] = {}
        for present, tokens, weights in ((True, given, given_weights), (False, [none], [1.0])):
            slots, padded = slots_of(tokens, weights, self.context_slots)
            bias = log_weights(padded).repeat_interleave(slots.shape[2], 1)[:, None, None].to(slots.dtype)
            attended = self.encoder.keys_and_values(slots.flatten(1, 2))
            conditions[present] = attended | {
                "context_bias": bias,
                "context_scale": scale * bool(padded.any()),
            }
        return conditions

    def _time_ids(self, request: Request) -> Conditions:
        if not self.model.xl:
            return {}
        height, width = request.query.shape[:2]
        return {
            "time_ids": torch.tensor(
                [[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype
            )
        }

    def _guidance(self, request: Request) -> Conditions:
        """Embed the guidance scale, (1, guidance_width), as diffusers' pipelines do for an LCM."""
        if self.guidance_width is None:
            return {}
        scale = torch.tensor([request.settings.guidance_scale - 1])
        embedded = self.model.pipe.get_guidance_scale_embedding(scale, embedding_dim=self.guidance_width)
        return {"guidance": embedded.to(self.device, self.dtype)}

    def _control(self, request: Request, cache: Cache) -> Conditions | None:
        if not request.controls:
            return None
        conditions: Conditions = {}
        scales = control_scales(request, len(self.controlnets))
        for n, (scale, control) in enumerate(zip(scales, request.controls, strict=True)):
            embedded = cache.get(f"control{n}:{content_key(control.pixels)}", partial(self._map, n, control))
            conditions |= {f"map{n}": embedded, f"scale{n}": embedded.new_full((1, 1, 1, 1), scale)}
        return conditions

    def _map(self, n: int, control: Control) -> Tensor:
        return self.map_embeddings[n]((to_tensor(control.pixels).to(self.device) / 255).to(self.dtype))

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        pixels = to_tensor(request.query).to(self.device) / 255 * 2 - 1
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.sample(generator)
        return (latents * self.vae.config.scaling_factor).float()

    def control(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, control: Conditions
    ) -> list[Tensor]:
        total: list[Tensor] = []
        for n, net in enumerate(self.controlnets):
            down, mid = net(
                latents.to(self.dtype),
                timesteps,
                encoder_hidden_states=None,
                controlnet_cond=control[f"map{n}"],
                added_cond_kwargs=_added(lanes),
                cross_attention_kwargs={"lanes": lanes},
                return_dict=False,
            )
            scaled = [residual * control[f"scale{n}"] for residual in (*down, mid)]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return total

    def predict(
        self, latents: Tensor, timesteps: Tensor, lanes: Conditions, residuals: list[Tensor] | None
    ) -> Tensor:
        return self.unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=None,
            timestep_cond=lanes.get("guidance"),
            added_cond_kwargs=_added(lanes),
            cross_attention_kwargs={"lanes": lanes},
            down_block_additional_residuals=None if residuals is None else tuple(residuals[:-1]),
            mid_block_additional_residual=None if residuals is None else residuals[-1],
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decode = self.vae.tiled_decode if tiled else self.vae.decode
        images = decode(scaled, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)


def _named(conditions: Conditions, prefixes: tuple[str, ...]) -> Conditions:
    """Return those conditions whose names begin with one of the prefixes."""
    return {name: value for name, value in conditions.items() if name.startswith(prefixes)}


def _added(lanes: Conditions) -> dict[str, Tensor]:
    """Return the conditions that SDXL adds: the pooled prompt and the sizes."""
    return {name: lanes[name] for name in ("text_embeds", "time_ids") if name in lanes}


class _ContextEncoder:
    """The image encoder, and the IP-Adapter's parts taken out of the U-Net, which would run them at every
    step."""

    def __init__(self, pipe: Any, preprocessing: ImageProcessor, normalization: Any) -> None:
        self.encoder = pipe.image_encoder
        self.normalization = normalization
        self.scale = preprocessing.scale
        [self.project] = pipe.unet.encoder_hid_proj.image_projection_layers
        self.keys = {
            f"unet.{name.removesuffix('.processor')}": (processor.to_k_ip[0], processor.to_v_ip[0])
            for name, processor in pipe.unet.attn_processors.items()
            if hasattr(processor, "to_k_ip")
        }
        pipe.unet.encoder_hid_proj = None
        pipe.unet.register_to_config(encoder_hid_dim_type=None)
        self.mean, self.std = (
            torch.tensor(part)[:, None, None] for part in (preprocessing.mean, preprocessing.std)
        )

    def encode(self, pixels: Pixels) -> Tensor:
        """Encode a context, uint8 (S, S, 3), to tokens (1, K, D)."""
        image = to_tensor(pixels)
        if self.normalization == "none":
            values = (image * self.scale - self.mean) / self.std
        else:
            values, _, _ = normalise(image, self.normalization)
        return self._features(values.to(self.encoder.device, self.encoder.dtype), empty=False)

    def none(self) -> Tensor:
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

    def keys_and_values(self, tokens: Tensor) -> Conditions:
        conditions = {}
        for name, (key, value) in self.keys.items():
            conditions[f"{name}.context_k"] = key(tokens)
            conditions[f"{name}.context_v"] = value(tokens)
        return conditions
