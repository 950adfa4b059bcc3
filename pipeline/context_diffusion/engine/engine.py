"""The engine: a fixed number of lanes; each step advances every row in a slot by one denoising step of its own.

Rows have their own timestep, number of steps, sampler, guidance, control window and contexts. The U-Net always sees
chunks of one fixed shape, padded, so a row's bits don't depend on its neighbours. Knows nothing of Ray or files.

R rows in slots, each of 1 to 3 lanes   P lanes a chunk   C h w latents
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.conditions import Conditioner, Lane, control_window, is_finite, start_step, to_tensor
from context_diffusion.engine.guidance import branches
from context_diffusion.engine.samplers import Table, make_table
from context_diffusion.errors import ErrorCode, RowError
from context_diffusion.schema import Failure, Request, Result

Outcome = tuple[Request, Result | Failure]


@dataclass
class Slot:
    """A row under way. latents: (1, C, h, w) float32; control: its encoded control map."""

    request: Request
    table: Table
    step: int
    latents: Tensor
    lanes: list[Lane]
    control: Tensor | None
    window: range
    generator: torch.Generator
    seconds: float = 0.0

    @property
    def shape(self) -> torch.Size:
        return self.latents.shape

    @property
    def controlled(self) -> bool:
        return self.control is not None and self.step in self.window

    @property
    def model_input(self) -> Tensor:
        return self.latents * self.table.coefficients[self.step, 0]


@dataclass
class Engine:
    """backbone on its device; chunk: lanes in one call of the U-Net; lanes: lanes in use at most."""

    backbone: Backbone
    device: torch.device
    chunk: int = 2
    lanes: int = 8
    waiting: deque[Request] = field(default_factory=deque)
    slots: list[Slot] = field(default_factory=list)
    used_lane_steps: int = 0
    paid_lane_steps: int = 0

    def __post_init__(self) -> None:
        self.conditioner = Conditioner(self.backbone, self.device)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.slots

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """Admits waiting rows, advances every row by one step; returns the rows that ended."""
        ended = self._admit()
        start = time.perf_counter()
        for shape in dict.fromkeys(slot.shape for slot in self.slots):
            self._advance([slot for slot in self.slots if slot.shape == shape])
        self._share_time(time.perf_counter() - start)
        finished = [slot for slot in self.slots if slot.step == len(slot.table)]
        self.slots = [slot for slot in self.slots if slot.step < len(slot.table)]
        return ended + [(slot.request, self._finish(slot)) for slot in finished]

    def run(self, requests: list[Request]) -> Iterator[Outcome]:
        """All requests, each as it finishes."""
        self.waiting.extend(requests)
        while not self.idle:
            yield from self.step()

    def _admit(self) -> list[Outcome]:
        """Moves waiting rows into free lanes, first come first served. Rows that cannot be made come back."""
        failed: list[Outcome] = []
        free = self.lanes - sum(len(slot.lanes) for slot in self.slots)
        while self.waiting and (not self.slots or free >= self._lanes_needed(self.waiting[0])):
            request = self.waiting.popleft()
            try:
                slot = self._open(request)
            except RowError as error:
                failed.append((request, Failure(error.code, error.message)))
                continue
            self.slots.append(slot)
            free -= len(slot.lanes)
        return failed

    @staticmethod
    def _has_prompt(request: Request) -> bool:
        return (request.prompt or "") != (request.negative_prompt or "")

    def _lanes_needed(self, request: Request) -> int:
        return len(branches(request.settings, self._has_prompt(request)))

    def _open(self, request: Request) -> Slot:
        started = time.perf_counter()
        settings = request.settings
        assert settings.seed is not None, "the seed is derived before the engine"
        table = make_table(settings.scheduler, settings.num_inference_steps, self.backbone.scheduler_config)
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        first = start_step(len(table), settings.strength)
        return Slot(
            request,
            table,
            first,
            self._initial_latents(request, table, first, generator),
            self.conditioner.lanes(request, branches(settings, self._has_prompt(request))),
            self._encode_control(request),
            control_window(len(table), settings.control_guidance_start, settings.control_guidance_end),
            generator,
            time.perf_counter() - started,
        )

    def _encode_control(self, request: Request) -> Tensor | None:
        if request.control is None:
            return None
        return self.backbone.encode_control(to_tensor(request.control).to(self.device), [request.control_kind])

    def _initial_latents(self, request: Request, table: Table, first: int, generator: torch.Generator) -> Tensor:
        """(1, C, h, w): noise at the sampler's scale, or the query's latents with noise up to the first step."""
        channels, side, _ = self.backbone.latent_shape
        factor = self.backbone.image_size // side
        height, width = request.query.shape[0] // factor, request.query.shape[1] // factor
        noise = torch.randn(1, channels, height, width, generator=generator).to(self.device)
        if request.settings.strength is None:
            return noise * table.init_scale * self.backbone.noise_scale
        if first == len(table):  # a strength too small for one step: the query comes back as the autoencoder has it
            return self.backbone.encode_pixels(to_tensor(request.query).to(self.device)).float()
        image, scale = table.noised[first].tolist()
        return self.backbone.encode_pixels(to_tensor(request.query).to(self.device)).float() * image + noise * scale

    def _advance(self, slots: list[Slot]) -> None:
        """One step for rows of one latent shape."""
        active = [slot for slot in slots if slot.step < len(slot.table)]
        residuals = self._control(active)
        work = [(index, lane) for index, slot in enumerate(active) for lane in slot.lanes]
        guided = [torch.zeros_like(slot.latents) for slot in active]
        for begin in range(0, len(work), self.chunk):
            part = work[begin : begin + self.chunk]
            for (index, lane), output in zip(part, self._predict(active, part, residuals), strict=True):
                guided[index] += lane.weight * output
        for slot, output in zip(active, guided, strict=True):
            _, p, q, a, b, _, _ = slot.table.coefficients[slot.step].tolist()
            x0 = p * slot.latents + q * output
            slot.latents = a * slot.latents + b * x0
            slot.step += 1
        self.used_lane_steps += len(work)
        self.paid_lane_steps += -(-len(work) // self.chunk) * self.chunk

    def _predict(self, slots: list[Slot], part: list[tuple[int, Lane]], residuals: Any) -> Tensor:
        """One call of the U-Net for up to P lanes, padded to P with copies of the first. -> (lanes, C, h, w)."""
        padded = part + [part[0]] * (self.chunk - len(part))
        rows = [slots[index] for index, _ in padded]
        down, mid = _gather(residuals, [index for index, _ in padded])
        output = self.backbone.predict(
            torch.cat([slot.model_input for slot in rows]),
            torch.stack([slot.table.timesteps[slot.step] for slot in rows]).to(self.device),
            torch.cat([lane.hidden for _, lane in padded]),
            torch.cat([lane.bias for _, lane in padded]),
            down,
            mid,
        )
        return output.float().split(1)[: len(part)]

    def _control(self, slots: list[Slot]) -> dict[int, tuple[list[Tensor], Tensor]]:
        """The ControlNet's residuals of each row that is in its window, once a row, not once a lane."""
        found: dict[int, tuple[list[Tensor], Tensor]] = {}
        for index, slot in enumerate(slots):
            if not slot.controlled or slot.control is None:
                continue
            timestep = slot.table.timesteps[slot.step : slot.step + 1].to(self.device)
            down, mid = self.backbone.control(slot.model_input, timestep, slot.control)
            scale = slot.request.settings.controlnet_conditioning_scale
            found[index] = [residual * scale for residual in down], mid * scale
        return found

    def _finish(self, slot: Slot) -> Result | Failure:
        if not is_finite(slot.latents):
            return Failure(ErrorCode.ENGINE_ERROR, "the latents are not finite: try a smaller guidance_scale")
        started = time.perf_counter()
        pixels = self.conditioner.restore(self.backbone.decode(slot.latents).float(), slot.request)[0]
        image = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        seconds = slot.seconds + time.perf_counter() - started
        return Result(image, seconds, len(slot.lanes), self.device.type)

    def _share_time(self, seconds: float) -> None:
        total = sum(len(slot.lanes) for slot in self.slots)
        for slot in self.slots:
            slot.seconds += seconds * len(slot.lanes) / total


def _gather(residuals: dict[int, tuple[list[Tensor], Tensor]], indices: list[int]) -> tuple[Any, Any]:
    """The residuals of the rows at `indices`, in a batch; zeros for rows without; (None, None) where none has any."""
    if not any(index in residuals for index in indices):
        return None, None
    like_down, like_mid = next(iter(residuals.values()))
    none = [torch.zeros_like(residual) for residual in like_down], torch.zeros_like(like_mid)
    chosen = [residuals.get(index, none) for index in indices]
    down = [torch.cat(parts) for parts in zip(*(down for down, _ in chosen), strict=True)]
    return down, torch.cat([mid for _, mid in chosen])
