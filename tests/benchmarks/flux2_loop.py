"""Batches of FLUX.2 [klein] by diffusers' own Flux2KleinPipeline, with the interface of diffusers_loop.py.

It repeats one set of references over a batch, so rows that share no references run one by one.

B rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers_loop import batches
from PIL import Image
from torch import Tensor

from context_diffusion.core.model_parts import Parts
from context_diffusion.core.records import Request
from context_diffusion.models.compilation import compile_blocks
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.conditioning import content_key
from context_diffusion.models.flux2.prompts import full_prompt


class Flux2Loop:
    """diffusers' pipeline as diffusers loads it, in the product's dtype."""

    def __init__(self, model: dict[str, Any], device: torch.device) -> None:
        self.parts, self.device = Parts.model_validate(model), device
        dtype = ComponentLoader(self.parts, device).dtype
        self.pipe = Flux2KleinPipeline.from_pretrained(self.parts.base, dtype=dtype).to(device)
        self.pipe.set_progress_bar_config(disable=True)

    def compile(self) -> None:
        """Compile each block, as diffusers' documents advise and as the engine does: kernels on thousands of
        tokens take so long that CUDA graphs over them gain nothing. On a CPU nothing is compiled."""
        if self.device.type == "cuda":
            compile_blocks([self.pipe.transformer])

    def batches(self, requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
        """Split rows into batches of one set of references, one size of output and one number of steps."""

        def key(request: Request) -> tuple[Any, ...]:
            images = tuple(content_key(image) for image in (request.query, *request.contexts))
            return request.output_size, images, request.settings.num_inference_steps

        return batches(requests, size, key)

    def form(self, requests: Sequence[Request]) -> tuple[Any, ...]:
        """Return what a compiled block is compiled for: rows, tokens of the output and of the references."""
        first = requests[0]
        width, height = first.output_size
        references = sum(image.shape[0] * image.shape[1] for image in (first.query, *first.contexts))
        return len(requests), width * height, references

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], steps: int | None = None) -> Tensor:
        """Generate one batch of rows that `batches` puts together, uint8 (B, H, W, 3) on the host.

        steps: default: those of the rows."""
        first = requests[0]
        references = [first.query, *first.contexts]
        width, height = first.output_size
        images = self.pipe(
            image=[Image.fromarray(image) for image in references],
            prompt=[
                full_prompt(self.parts.prompt_template, request.prompt, len(references))
                for request in requests
            ],
            width=width,
            height=height,
            num_inference_steps=steps or first.settings.num_inference_steps,
            guidance_scale=1.0,
            latents=self._noise(requests),
            output_type="pt",
        ).images
        return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def _noise(self, requests: Sequence[Request]) -> Tensor:
        """Draw each row's noise (1, C, h, w) from its own seed in float32, as the engine does."""
        side = 2 * self.pipe.vae_scale_factor
        width, height = (pixels // side for pixels in requests[0].output_size)
        shape = (1, self.pipe.transformer.config.in_channels, height, width)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(request.settings.seed or 0))
            for request in requests
        ]
        return torch.cat(noise)
