"""FLUX.2 [klein] as the engine's backbone: the query is the first reference, the contexts are the others.

Each row equals what diffusers' Flux2KleinPipeline generates for it alone.

P lanes  S tokens: L of the text, T of the output, R of the references  C channels  h w tokens of the output
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Request
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.inputs.context_images import ContextPreprocessing, ReferenceImage
from context_diffusion.models.attention import log_weights
from context_diffusion.models.conditioning import content_key, latent_size
from context_diffusion.models.flux2.loading import Flux2
from context_diffusion.models.flux2.prompts import LENGTH, PromptEncoder, full_prompt
from context_diffusion.models.flux2.references import (
    ImageCodec,
    References,
    padded_length,
    positions,
    references_of,
)
from context_diffusion.models.flux2.transformer import LaneTokens, predict, prepare, rotation
from context_diffusion.models.resolution.defaults import FLUX2_CONTEXTS
from context_diffusion.models.resolution.resolve import ResolvedModel


class Flux2Backbone:
    """Implement engine/backbone.py. model: loaded. resolved: what it was loaded from. padded: references are
    padded to few lengths, so that more rows share a call."""

    context_slots = FLUX2_CONTEXTS
    noise_scale = 1.0
    tiles = True
    num_controlnets = 0

    def __init__(self, model: Flux2, resolved: ResolvedModel, padded: bool) -> None:
        assert isinstance(resolved.contexts, ReferenceImage)
        pipe, parts = model.pipe, model.parts
        self.transformer = pipe.transformer
        prepare(self.transformer)
        self.text = PromptEncoder(pipe.tokenizer, pipe.text_encoder.model, parts.base, model.offloaded)
        self.images = ImageCodec(pipe.vae)
        self.template, self.padded = parts.prompt_template, padded
        self.contexts: ContextPreprocessing = resolved.contexts
        self.scheduler_config: dict[str, Any] = dict(pipe.scheduler.config)
        self.image_size = resolved.image_size
        self.refusal = resolved.defaults.refusal

    @property
    def denoisers(self) -> list[nn.Module]:
        return [self.transformer]

    @property
    def weight(self) -> Tensor:
        return self.transformer.x_embedder.weight

    def branches(self, request: Request) -> list[Branch]:
        settings = request.settings
        if reason := self.refusal(settings):
            raise RowError(ErrorCode.INVALID_SETTING, reason)
        scale = settings.guidance_scale
        if scale > 1:
            return [
                Branch(1.0 - scale, contexts=True, prompt=False),
                Branch(scale, contexts=True, prompt=True),
            ]
        if request.negative_prompt:
            message = (
                "negative_prompt: it has no effect without guidance (a guidance_scale over 1); leave it out"
            )
            raise RowError(ErrorCode.INVALID_SETTING, message)
        return [Branch(1.0, contexts=True, prompt=True)]

    def shape_group(self, request: Request) -> tuple[int, int, int, bool]:
        """Return height and width of the output in tokens, the padded tokens of the references, and whether
        the attention needs a bias: without one its kernels are quicker."""
        references = references_of(request, self.context_slots + 1)
        return *self._output(request), *self._padding(references)

    def _padding(self, references: References) -> tuple[int, bool]:
        used = sum(height * width for height, width in references.sizes(self.images.pixels))
        padded = padded_length(used) if self.padded else used
        return padded, padded > used or any(weight != 1 for weight in references.weights)

    def _output(self, request: Request) -> tuple[int, int]:
        return latent_size(request, self.images.pixels)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.transformer.config.in_channels, *self._output(request)

    def schedule(self, request: Request) -> dict[str, Any]:
        """Return the noise levels, and their shift by the output's size, as diffusers' pipeline does."""
        height, width = self._output(request)
        steps = request.settings.num_inference_steps
        shift = {"mu": compute_empirical_mu(height * width, steps)}
        if self.scheduler_config.get("use_flow_sigmas"):
            return shift
        return shift | {"sigmas": np.linspace(1.0, 1 / steps, steps).tolist()}

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        references = references_of(request, self.context_slots + 1)
        text = full_prompt(self.template, request.prompt, len(references.images))
        shared = self._references(request, references, cache)
        lanes: list[Conditions] = []
        truncated = False
        for branch in branches:
            prompt = text if branch.prompt else request.negative_prompt or ""
            encoded, cut = cache.get(f"text:{prompt}", partial(self._text, prompt))
            truncated |= cut
            lanes.append({"text": encoded, **shared})
        return Encoded(lanes, None, truncated, full_prompt=text)

    def _text(self, prompt: str) -> tuple[Tensor, bool]:
        """Encode a prompt to the transformer's own tokens (1, L, J), and return whether it was truncated."""
        states = self.text(prompt).to(self.weight.dtype)
        return self.transformer.context_embedder(states), self.text.truncates(prompt)

    def _references(self, request: Request, references: References, cache: Cache) -> Conditions:
        """Encode the references, with the positions and the bias of the lane's tokens."""
        padded, biased = self._padding(references)
        encoded = [
            cache.get(f"reference:{content_key(image)}", partial(self.images.encode, image))
            for image in references.images
        ]
        tokens = torch.cat(encoded, 1)
        sizes, output = references.sizes(self.images.pixels), self._output(request)
        cos, sin = cache.get(
            f"positions:{output}:{sizes}:{padded}", partial(self._rotation, output, sizes, padded)
        )
        conditions: Conditions = {
            "references": F.pad(tokens, (0, 0, 0, padded - tokens.shape[1])).to(self.weight.dtype),
            "cos": cos,
            "sin": sin,
        }
        if biased:
            weights = [
                *[1.0] * (LENGTH + output[0] * output[1]),
                *[
                    w
                    for w, part in zip(references.weights, encoded, strict=True)
                    for _ in range(part.shape[1])
                ],
                *[0.0] * (padded - tokens.shape[1]),
            ]
            bias = log_weights(torch.tensor(weights))[None, None, None]
            conditions["bias"] = pinned(bias, self.weight.device).to(self.weight.dtype)
        return conditions

    def _rotation(
        self, output: tuple[int, int], sizes: list[tuple[int, int]], padded: int
    ) -> tuple[Tensor, Tensor]:
        ids = pinned(positions(LENGTH, output, sizes, padded), self.weight.device)
        cos, sin = rotation(self.transformer, ids)
        return cos[None], sin[None]

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        raise RowError(ErrorCode.INVALID_SETTING, "strength: this model has no image-to-image start")

    def predict(self, latents: Tensor, timesteps: Tensor, lanes: Any, control: Any, group: Any) -> Tensor:
        tokens = latents.to(self.weight.dtype).flatten(2).transpose(1, 2)
        read = LaneTokens(lanes["text"], lanes["references"], lanes["cos"], lanes["sin"], lanes.get("bias"))
        output = predict(self.transformer, tokens, timesteps, read)
        return output.transpose(1, 2).unflatten(2, latents.shape[2:])

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        return self.images.decode(latents, tiled)
