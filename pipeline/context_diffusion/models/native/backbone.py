"""The native model as the engine's backbone: prompts, contexts and layouts are encoded once a row, keys and
values too."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from context_diffusion.core.records import Pixels, Request
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.inputs.context_images import TEXTURE_PIXELS, ContextPreprocessing, SquareCrop
from context_diffusion.models.attention import LaneInputs, attend_by_lanes, keys_and_values
from context_diffusion.models.conditioning import (
    Context,
    content_key,
    control_scales,
    latent_size,
    slots_of,
    to_tensor,
    weighted_contexts,
)
from context_diffusion.models.native.draft_image import give_back
from context_diffusion.models.native.lane_drafts import Detail, NativeDrafts
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.preconditioning import EncodedDraft


class NativeBackbone:
    """Implement engine/backbone.py. The U-Net and the ControlNet are copies, since their attention is
    replaced."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.drafts = NativeDrafts(model)
        self.unet = copy.deepcopy(model.unet).eval().to(memory_format=torch.channels_last)
        self.controlnet = copy.deepcopy(model.controlnet).eval().to(memory_format=torch.channels_last)
        self.layers = attend_by_lanes(self.unet)
        # It depends on the layout alone: computed once a row, not once a step.
        self.layout_embedding = self.controlnet.controlnet_cond_embedding
        self.controlnet.controlnet_cond_embedding = nn.Identity()
        self.scheduler_config: dict[str, Any] = model.scheduler_config
        self.image_size = model.image_size
        self.context_slots = model.context_slots
        self.noise_scale = model.noise_scale
        self.contexts: ContextPreprocessing = SquareCrop(max(model.context_size, TEXTURE_PIXELS))
        self.tiles = False
        self.num_controlnets = 1
        self.latent_factor = model.image_size // model.latent_shape[1]

    @property
    def denoisers(self) -> list[nn.Module]:
        return [self.unet, self.controlnet]

    def shape_group(self, request: Request) -> tuple[int, ...]:
        return self.latent_shape(request)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.model.latent_shape[0], *latent_size(request, self.latent_factor)

    def branches(self, request: Request) -> list[Branch]:
        """Return the row's branches.

        A row without a prompt has one, since its draft shows the contexts already, unless its
        context_guidance_scale differs from its guidance_scale, which it is by default.
        """
        has_prompt = (request.prompt or "") != (request.negative_prompt or "")
        settings = request.settings
        if not has_prompt and settings.context_guidance_scale in (None, settings.guidance_scale):
            settings = settings.model_copy(update={"guidance_scale": 1.0, "context_guidance_scale": None})
        return guidance_branches(settings, has_prompt)

    def schedule(self, request: Request) -> dict[str, Any]:
        return {}

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        model = self.model
        row_contexts = weighted_contexts(request, self.context_slots)
        tokens = [
            cache.get(f"context:{context.key}", partial(self._context, context.pixels))
            for context in row_contexts
        ]
        scale = request.settings.context_scale
        contexts, weights = slots_of(
            tokens, [context.weight * scale for context in row_contexts], self.context_slots
        )
        lanes: list[Conditions] = []
        detail = Detail()
        for branch in branches:
            # The last branch has all conditions of the row: the detail is that of its draft.
            lane_draft = Conditions()
            if model.drafts:
                lane_draft, detail = self.drafts.of(request, branch, row_contexts, cache)
            prompt = (request.prompt if branch.prompt else request.negative_prompt) or ""
            text, mask = cache.get(f"text:{prompt}", partial(model.encode_text, [prompt]))
            hidden, bias = model.fuse(text, mask, contexts, weights if branch.contexts else weights * 0)
            pooled = model.pool(hidden, bias)
            text_keys = keys_and_values(self.layers, hidden)
            lane_bias = bias[:, None].to(hidden.dtype)
            lanes.append(Conditions(text=text_keys, bias=lane_bias, pooled=pooled) | lane_draft)
        truncated = any(model.truncates(prompt) for prompt in (request.prompt, request.negative_prompt))
        return Encoded(
            lanes,
            self._layout(request, cache),
            truncated=truncated,
            unknown_words=self.drafts.words(request.prompt, cache).unknown,
            finish=partial(self._finish, row_contexts, detail),
        )

    def _context(self, pixels: Any) -> Tensor:
        return self.model.encode_images(self.model.context_pixels(to_tensor(pixels, self.model.device)))

    def _layout(self, request: Request, cache: Cache) -> Conditions | None:
        if not request.controls:
            return None
        [scale], [control] = control_scales(request, 1), request.controls

        def embed() -> Tensor:
            latents = self.model.encode_control(to_tensor(control.given, self.model.device), [control.kind])
            return self.layout_embedding(latents.to(self.model.dtype))

        layout = cache.get(f"control:{control.kind}:{content_key(control.given)}", embed)
        return {"layout": layout, "scale": layout.new_full((1, 1), scale)}

    def encode_query(self, request: Request, generator: torch.Generator) -> Tensor:
        return self.model.encode_pixels(to_tensor(request.query, self.model.device)).float()

    def predict(
        self, latents: Tensor, timesteps: Tensor, lanes: Any, control: Conditions | None, group: Any
    ) -> Tensor:
        down, mid, draft = None, None, None
        if control is not None:
            down, mid, draft = self._control(latents, timesteps, lanes, control)
        given, gain, known = self.model.precondition(latents, timesteps, draft)
        output = self.unet(
            given,
            timesteps,
            encoder_hidden_states=None,
            class_labels=lanes["pooled"].to(self.model.dtype),
            cross_attention_kwargs={"lanes": LaneInputs(lanes["text"], lanes["bias"])},
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return gain * output + known

    def _control(
        self, latents: Tensor, timesteps: Tensor, lanes: Any, control: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, EncodedDraft | None]:
        """Return the ControlNet's residuals, and the draft: it is part of the layout, so it is scaled with
        it."""
        down, mid = self.controlnet(
            latents.to(self.model.dtype),
            timesteps,
            encoder_hidden_states=None,
            controlnet_cond=control["layout"],
            return_dict=False,
        )
        scale = control["scale"][..., None, None]
        draft = None
        if self.model.drafts:
            draft = EncodedDraft(lanes["draft"] * scale, lanes["draft_latents"] * scale)
        return tuple(residual * scale for residual in down), mid * scale, draft

    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        return self.model.decode(latents).float()

    def _finish(self, contexts: list[Context], detail: Detail, image: Tensor) -> Tensor:
        """Return draft + rest_scale · (image - the autoencoder's copy of the draft), so that nothing of the
        draft is lost in the autoencoder; and give the image the statistics of its contexts where the model
        does.

        image: decoded, (1, 3, H, W). detail: of NativeDrafts.of; empty: the row has no draft."""
        if detail:
            image = give_back(image, **detail)
        if not self.model.restores:
            return image
        pixels = torch.cat([to_tensor(context.pixels, image.device) for context in contexts])
        weights = torch.tensor([context.weight for context in contexts], device=image.device)
        return self.model.restore(image, pixels, weights)

    def draft_image(self, request: Request) -> Pixels:
        """Return the draft of a row, uint8 (H, W, 3): its image before the diffusion model."""
        image = self.drafts.image_of(request)[0].permute(1, 2, 0)
        return (image * 255).round().byte().cpu().numpy()
