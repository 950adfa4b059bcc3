"""Stable Diffusion with ControlNets and an IP-Adapter as the engine's backbone.

Each row equals what diffusers' own pipeline generates for it alone.

B lanes  T text tokens  K tokens a context  D width  C h w latents
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Request
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.inputs.context_images import ContextPreprocessing, ImageProcessor
from context_diffusion.models.attention import ABSENT, LaneInputs, keys_and_values
from context_diffusion.models.conditioning import control_scales, latent_size, to_tensor
from context_diffusion.models.resolution.defaults import CONTEXT_SLOTS
from context_diffusion.models.resolution.resolve import ResolvedModel, latent_factor
from context_diffusion.models.stable_diffusion.contexts import ContextConditions
from context_diffusion.models.stable_diffusion.control_networks import ControlNetworks
from context_diffusion.models.stable_diffusion.loading import StableDiffusion
from context_diffusion.models.stable_diffusion.row_loras import LoraKey, Networks, RowNetworks, lora_key


class Group(NamedTuple):
    """A shape group. latents: their shape. lora: of the rows. masked: their contexts have masks."""

    latents: tuple[int, ...]
    lora: LoraKey | None
    masked: bool


class StableBackbone:
    """Implement engine/backbone.py. model: loaded. resolved: what it was loaded from."""

    def __init__(self, model: StableDiffusion, resolved: ResolvedModel) -> None:
        assert isinstance(resolved.contexts, ImageProcessor)
        pipe = model.pipe
        self.model = model
        self.unet = pipe.unet
        self.vae = pipe.vae
        adapted = pipe.unet.config.encoder_hid_dim_type
        self.encoder = (
            ContextConditions(pipe, resolved.contexts, model.parts.normalization, model.xl)
            if adapted
            else None
        )
        self.networks = RowNetworks(pipe, model.row_loras, model.xl, model.parts)
        self.refusal = resolved.defaults.refusal
        self.controlnets = ControlNetworks(model.controlnets, model.depth)
        for network in (*self.denoisers, self.vae):
            network.to(memory_format=torch.channels_last)
        # An LCM's U-Net reads the guidance scale as a number, so one lane replaces both branches.
        self.guidance_width: int | None = self.unet.config.time_cond_proj_dim
        self.scheduler_config: dict[str, Any] = dict(pipe.scheduler.config)
        self.latent_factor = latent_factor(self.vae.config)
        self.statistics = latent_statistics(self.vae.config, self.device) if model.xl else None
        self.image_size = resolved.image_size
        self.contexts: ContextPreprocessing = resolved.contexts
        self.tiles = True
        self.num_controlnets = len(model.controlnets)
        self.context_slots = CONTEXT_SLOTS
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
        if reason := self.refusal(settings):
            raise RowError(ErrorCode.INVALID_SETTING, reason)
        if self.guidance_width is None:
            text = self.networks.base.text
            differs = text.key(request.prompt, False) != text.key(request.negative_prompt, True)
            return guidance_branches(settings, differs)
        if settings.context_guidance_scale not in (None, settings.guidance_scale):
            message = (
                "context_guidance_scale: this model reads one guidance scale, for prompt and contexts "
                "together; leave it out, and set context_scale for the contexts' strength"
            )
            raise RowError(ErrorCode.INVALID_SETTING, message)
        return [Branch(1.0, contexts=True, prompt=True)]

    def shape_group(self, request: Request) -> Group:
        return Group(self.latent_shape(request), lora_key(request.settings), bool(request.masks))

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.vae.config.latent_channels, *latent_size(request, self.latent_factor)

    def schedule(self, request: Request) -> dict[str, Any]:
        return {}

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        networks = self.networks(lora_key(request.settings))
        contexts = {branch.contexts: self._contexts(request, branch.contexts, cache) for branch in branches}
        both = self._time_ids(request) | self._guidance(request)
        lanes: list[Conditions] = []
        truncated = False
        for branch in branches:
            prompt, negative = (request.prompt, False) if branch.prompt else (request.negative_prompt, True)
            key = f"text:{networks.key}:{networks.text.key(prompt, negative)}"
            text, cut = cache.get(key, partial(self._text, networks, prompt, negative))
            truncated |= cut
            lanes.append(text | contexts[branch.contexts] | both)
        return Encoded(lanes, self._control_maps(request, cache), truncated)

    def _contexts(self, request: Request, present: bool, cache: Cache) -> Conditions:
        """Encode the contexts of a guidance branch."""
        if self.encoder is None:
            return {}
        return self.encoder(request, latent_size(request, self.latent_factor), present, cache)

    def _text(self, networks: Networks, prompt: str | None, negative: bool) -> tuple[Conditions, bool]:
        """Encode a prompt to the keys and values of all layers, and return whether it was truncated."""
        hidden, pooled, mask = networks.text(prompt, negative)
        conditions: Conditions = {"text": keys_and_values(networks.layers, hidden)}
        conditions |= self.controlnets.text(hidden)
        if pooled is not None:
            conditions["text_embeds"] = pooled
        if networks.text.chunks > 1:
            conditions["bias"] = torch.where(mask, 0.0, ABSENT)[:, None, None].to(hidden.dtype)
        return conditions, networks.text.truncates(prompt)

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
        if self.statistics:
            mean, std = self.statistics
            latents = (latents - mean) / std
        return (latents * self.vae.config.scaling_factor).float()

    def predict(self, latents: Tensor, timesteps: Tensor, lanes: Any, control: Any, group: Group) -> Tensor:
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
            lanes.get("context_masks", ()),
        )
        return self.networks(group.lora).unet(
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
        scaled = latents / self.vae.config.scaling_factor
        if self.statistics:
            mean, std = self.statistics
            scaled = scaled * std + mean
        scaled = scaled.to(self.vae.dtype)
        decode = self.vae.tiled_decode if tiled else self.vae.decode
        images = decode(scaled, return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)


def latent_statistics(config: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the std of each channel of an autoencoder's latents, (1, C, 1, 1), where its
    configuration has both: diffusers' XL pipelines read them, those of 1.x and 2.x do not."""
    parts = config.get("latents_mean"), config.get("latents_std")
    if None in parts:
        return None
    mean, std = (torch.tensor(part, device=device)[None, :, None, None].float() for part in parts)
    return mean, std
