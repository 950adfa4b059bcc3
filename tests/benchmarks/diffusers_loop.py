"""Batches as diffusers' ControlNet pipelines run them, over the pipeline's own modules and scheduler.

A pipeline's call takes one set of context images for a whole batch, so this is its loop, written out:
prompts, contexts and control maps are encoded in one batch; at each step all branches of all rows go through
ControlNet and U-Net; each batch has one number of steps, and guidance where any of its rows has.

B rows  N contexts of a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import diffusers
import torch
from torch import Tensor

from context_diffusion.core.model_parts import Parts
from context_diffusion.core.records import Request
from context_diffusion.inputs.context_images import CLIP_MEAN, CLIP_STD
from context_diffusion.models.conditioning import to_tensor
from context_diffusion.models.stable_diffusion.loading import load


class DiffusersLoop:
    """The components of the product's own loader in diffusers' ControlNet pipeline, channels last, without
    the product's changes to them."""

    def __init__(self, model: dict[str, Any], device: torch.device) -> None:
        loaded = load(Parts.model_validate(model), device)
        self.xl, self.device, [net] = loaded.xl, device, loaded.controlnets
        name = f"StableDiffusion{'XL' if self.xl else ''}ControlNetPipeline"
        own = {"add_watermarker": False} if self.xl else {"requires_safety_checker": False}
        self.pipe = getattr(diffusers, name)(**loaded.pipe.components, controlnet=net, **own)
        for network in (self.pipe.unet, net, self.pipe.vae):
            network.to(memory_format=torch.channels_last)
        self.predict = self._predict

    def compile(self) -> None:
        """Compile a whole step with CUDA graphs, the quickest that torch.compile offers. On a CPU it is only
        traced."""
        gpu = self.device.type == "cuda"
        self.predict = torch.compile(
            self._predict,
            dynamic=False,
            backend="inductor" if gpu else "eager",
            mode="reduce-overhead" if gpu else None,
            recompile_limit=64,  # one for each form of a batch
        )

    def batches(self, requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
        """Split rows into batches of one size of image."""
        return batches(requests, size, lambda request: request.query.shape)

    def form(self, requests: Sequence[Request]) -> tuple[Any, ...]:
        """Return what a compiled step is compiled for."""
        guided = any(request.settings.guidance_scale > 1 for request in requests)
        return len(requests), guided, requests[0].query.shape

    def _predict(
        self, latents: Tensor, time: Tensor, text: Tensor, image: Tensor, added: dict[str, Any]
    ) -> Tensor:
        control_added = {name: value for name, value in added.items() if name != "image_embeds"}
        down, mid = self.pipe.controlnet(
            latents, time, text, image, added_cond_kwargs=control_added, return_dict=False
        )
        return self.pipe.unet(
            latents,
            time,
            text,
            added_cond_kwargs=added,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], steps: int | None = None) -> Tensor:
        """Generate one batch of rows of equal size and context_scale, uint8 (B, H, W, 3) on the host.

        steps: default: those of the longest row."""
        settings = [request.settings for request in requests]
        guided = any(row.guidance_scale > 1 for row in settings)
        scales = torch.tensor([max(row.guidance_scale, 1.0) for row in settings], device=self.device)
        self.pipe.set_ip_adapter_scale(settings[0].context_scale)
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps or max(row.num_inference_steps for row in settings), device=self.device)
        text, added = self._text(requests, guided)
        added["image_embeds"] = [self._contexts(requests, guided)]
        dtype = self.pipe.unet.dtype
        maps = torch.cat([to_tensor(request.controls[0].pixels) for request in requests])
        maps = (maps.to(self.device) / 255).to(dtype).repeat(2 if guided else 1, 1, 1, 1)
        latents = self._noise(requests)
        for time in scheduler.timesteps:
            both = torch.cat([latents, latents]) if guided else latents
            torch.compiler.cudagraph_mark_step_begin()
            output = self.predict(scheduler.scale_model_input(both, time), time, text, maps, added).clone()
            if guided:
                without, shown = output.chunk(2)
                output = without + scales.to(dtype)[:, None, None, None] * (shown - without)
            latents = scheduler.step(output, time, latents, return_dict=False)[0]
        return self._decode(latents)

    def _text(self, requests: Sequence[Request], guided: bool) -> tuple[Tensor, dict[str, Any]]:
        encoded = self.pipe.encode_prompt(
            [request.prompt or "" for request in requests],
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        text = torch.cat([encoded[1], encoded[0]]) if guided else encoded[0]
        if not self.xl:
            return text, {}
        pooled = torch.cat([encoded[3], encoded[2]]) if guided else encoded[2]
        height, width = requests[0].query.shape[:2]
        times = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=text.dtype)
        return text, {"text_embeds": pooled, "time_ids": times.repeat(len(text), 1)}

    def _contexts(self, requests: Sequence[Request], guided: bool) -> Tensor:
        """Encode contexts to what the IP-Adapter's projection reads, (B, N, ...), those of no context first
        where guided."""
        encoder, count = self.pipe.image_encoder, len(requests[0].contexts)
        pixels = torch.cat([to_tensor(context) for request in requests for context in request.contexts])
        mean, std = (torch.tensor(part, device=self.device)[:, None, None] for part in (CLIP_MEAN, CLIP_STD))
        values = ((pixels.to(self.device) / 255 - mean) / std).to(encoder.dtype)
        shown = encoder(values, output_hidden_states=True).hidden_states[-2]
        shown = shown.unflatten(0, (len(requests), count))
        if not guided:
            return shown
        none = encoder(torch.zeros_like(values[:1]), output_hidden_states=True).hidden_states[-2]
        return torch.cat([none[:, None].expand_as(shown), shown])

    def _noise(self, requests: Sequence[Request]) -> Tensor:
        height, width = (side // self.pipe.vae_scale_factor for side in requests[0].query.shape[:2])
        shape = (1, self.pipe.unet.config.in_channels, height, width)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(request.settings.seed or 0))
            for request in requests
        ]
        latents = torch.cat(noise).to(self.device, self.pipe.unet.dtype)
        return latents * self.pipe.scheduler.init_noise_sigma

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        pixels = (images.float() / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def batches(requests: Sequence[Request], size: int, key: Callable[[Request], Any]) -> Iterator[list[Request]]:
    """Split rows into batches of up to `size` rows of equal keys, in their order otherwise."""
    for _, group in groupby(sorted(requests, key=key), key=key):
        rows = list(group)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
