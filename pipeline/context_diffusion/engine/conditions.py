"""What a row needs once, before its first step: text and context embeddings, fused tokens for each lane.

Everything runs one sample at a time, so its bits cannot depend on neighbours; embeddings are cached by content.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.guidance import Branch
from context_diffusion.errors import ErrorCode, RowError
from context_diffusion.schema import Pixels, Request

Value = TypeVar("Value")


@dataclass(frozen=True)
class Lane:
    """One guidance branch of a row: hidden (1, L, D), bias (1, 1, L)."""

    weight: float
    hidden: Tensor
    bias: Tensor


class Cache(Generic[Value]):
    """Least recently used values by key, bounded by their count."""

    def __init__(self, entries: int) -> None:
        self.entries, self.hits, self.misses = entries, 0, 0
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        if key in self._values:
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]
        self.misses += 1
        value = self._values[key] = make()
        if len(self._values) > self.entries:
            self._values.popitem(last=False)
        return value


def to_tensor(pixels: Pixels) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (1, 3, H, W)."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


class Conditioner:
    """Requests -> lanes, with caches that live as long as the engine."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        self.texts: Cache[tuple[Tensor, Tensor]] = Cache(4096)
        self.contexts: Cache[Tensor] = Cache(4096)

    def lanes(self, request: Request, wanted: list[Branch]) -> list[Lane]:
        """A lane for each branch. Contexts are put in the order of their content, so that their order in the row
        cannot change a bit. Raises RowError where there are more contexts than the model has slots."""
        slots = self.backbone.context_slots
        if len(request.contexts) > slots:
            raise RowError(ErrorCode.TOO_MANY_CONTEXTS, f"{len(request.contexts)} contexts, the model takes at most {slots}")
        weighted = self._weighted(request)
        shown = torch.cat([tokens for tokens, _ in weighted])
        contexts = shown.new_zeros(1, slots, *shown.shape[1:])
        contexts[0, : len(weighted)] = shown
        weights = torch.zeros(1, slots, device=self.device)
        weights[0, : len(weighted)] = torch.tensor([weight for *_, weight in weighted])
        found = []
        for branch in wanted:
            text, mask = self._text(request.prompt if branch.prompt else request.negative_prompt)
            hidden, bias = self.backbone.fuse(text, mask, contexts, weights if branch.contexts else weights * 0)
            found.append(Lane(branch.weight, hidden, bias))
        return found

    def restore(self, images: Tensor, request: Request) -> Tensor:
        """Decoded pixels (1, 3, H, W) of a row -> what the backbone gives back of its contexts' statistics."""
        if not self.backbone.restores:
            return images
        ordered = self._ordered(request)
        contexts = torch.cat([to_tensor(context) for _, context, _ in ordered]).to(self.device)
        return self.backbone.restore(images, contexts, torch.tensor([weight for *_, weight in ordered], device=self.device))

    def _weighted(self, request: Request) -> list[tuple[Tensor, float]]:
        return [
            (self.contexts.get(key, partial(self._image, context)), weight) for key, context, weight in self._ordered(request)
        ]

    @staticmethod
    def _ordered(request: Request) -> list[tuple[str, Pixels, float]]:
        """Key, pixels and weight of each context, in an order that the row's own doesn't change."""
        settings = request.settings
        given = settings.context_weights or [1.0] * len(request.contexts)
        if len(given) != len(request.contexts):
            raise RowError(
                ErrorCode.INVALID_SETTING,
                f"context_weights has {len(given)} values for {len(request.contexts)} contexts",
            )
        weights = [weight * settings.context_scale for weight in given]
        keyed = zip(request.context_keys, request.contexts, weights, strict=True)
        return sorted(keyed, key=lambda item: (item[0], item[2]))

    def _text(self, prompt: str | None) -> tuple[Tensor, Tensor]:
        return self.texts.get(prompt or "", lambda: self.backbone.encode_text([prompt or ""]))

    def _image(self, pixels: Pixels) -> Tensor:
        return self.backbone.encode_images(to_tensor(pixels).to(self.device))


def start_step(steps: int, strength: float | None) -> int:
    """The first step of an image-to-image row, as diffusers counts it: steps - min(int(steps · strength), steps)."""
    return 0 if strength is None else max(steps - min(int(steps * strength), steps), 0)


def control_window(steps: int, start: float, end: float) -> range:
    """The steps at which the ControlNet acts: diffusers keeps step i where i/n >= start and (i+1)/n <= end."""
    kept = [i for i in range(steps) if not (i / steps < start or (i + 1) / steps > end)]
    return range(kept[0], kept[-1] + 1) if kept else range(0)


def is_finite(latents: Tensor) -> bool:
    return math.isfinite(float(latents.abs().max()))
