"""A row under way: its table, latents and conditions, and the arithmetic of a step for many rows of one
shape.

R rows  C h w latents
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from context_diffusion.core.records import Request
from context_diffusion.engine.backbone import Backbone, Encoded
from context_diffusion.engine.conditioning import control_window, start_step
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.scheduler_tables import Table, make_table


@dataclass
class Slot:
    """latents, x0: (1, C, h, w) float32, x0 of the step before; weights: of each lane in the guided sum."""

    request: Request
    table: Table
    latents: Tensor
    encoded: Encoded
    weights: list[float]
    window: range
    generator: torch.Generator
    x0: Tensor | None = None
    step: int = 0
    seconds: float = 0.0
    used: int = 0  # lane-steps, and the share of those that the calls had room for
    paid: float = 0.0

    def charge(self, share: float, seconds: float, paid: float) -> None:
        """Add the row's share of what a step cost."""
        self.used += self.lanes
        self.paid += share * paid
        self.seconds += share * seconds

    @property
    def lanes(self) -> int:
        return len(self.weights)

    @property
    def left(self) -> int:
        return len(self.table) - self.step

    @property
    def controlled(self) -> bool:
        return self.encoded.control is not None and self.step in self.window

    @property
    def timestep(self) -> Tensor:
        return self.table.timesteps[self.step]

    @property
    def model_input(self) -> Tensor:
        return self.latents * float(self.table.coefficients[self.step, 0])


def open_slot(request: Request, backbone: Backbone, device: torch.device, cache: Cache) -> Slot:
    """Raises RowError where the row cannot be made."""
    started, settings = time.perf_counter(), request.settings
    assert settings.seed is not None, "the seed is derived before the engine"
    first = start_step(settings.num_inference_steps, settings.strength)
    table = make_table(settings.scheduler, settings.num_inference_steps, backbone.scheduler_config, first)
    branches = backbone.branches(request)
    encoded = backbone.encode(request, branches, cache)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    return Slot(
        request,
        table,
        initial_latents(request, table, backbone, generator).to(device),
        encoded,
        [branch.weight for branch in branches],
        control_window(len(table), settings.control_guidance_start, settings.control_guidance_end),
        generator,
        seconds=time.perf_counter() - started,
    )


def initial_latents(request: Request, table: Table, backbone: Backbone, generator: torch.Generator) -> Tensor:
    """(1, C, h, w): noise at the sampler's scale, or the query's latents with noise up to the first step."""
    height, width = (side // backbone.latent_factor for side in request.query.shape[:2])
    shape = (1, backbone.latent_channels, height, width)
    if request.settings.strength is None:
        return torch.randn(shape, generator=generator) * (table.init_scale * backbone.noise_scale)
    latents = backbone.encode_query(request, generator)  # draws before the noise, as diffusers does
    image, scale = table.noised  # 1 and 0 where the strength is too small for a step
    return latents * image + torch.randn(shape, generator=generator).to(latents.device) * scale


def advance(slots: Sequence[Slot], outputs: Tensor) -> None:
    """One step of rows of one shape. outputs: (R, C, h, w), the guided outputs of the model."""
    device = outputs.device
    steps = torch.stack([slot.table.coefficients[slot.step] for slot in slots]).float()
    _, p, q, a, b, c, _ = steps.to(device).T[..., None, None, None]
    latents = torch.cat([slot.latents for slot in slots])
    before = torch.cat([slot.latents if slot.x0 is None else slot.x0 for slot in slots])  # where None, c is 0
    x0 = p * latents + q * outputs
    latents = a * latents + b * outputs + c * before
    for row, slot in enumerate(slots):
        slot.x0, slot.latents = x0[row : row + 1], latents[row : row + 1]
        if d := float(steps[row, 6]):
            slot.latents = slot.latents + d * torch.randn(slot.latents.shape, generator=slot.generator).to(
                device
            )
        slot.step += 1
