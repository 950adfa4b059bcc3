"""What several kinds of backbone make of a request's contexts and prompts."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Pixels, Request
from context_diffusion.engine.lane_buffers import pinned
from context_diffusion.image_tensors import channels_first

# transformers' tokenizers keep the padding and truncation of a call on themselves, where other threads meet
# them.
TOKENIZING = threading.Lock()


def tokenize(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """Call a tokenizer of transformers. Safe for several threads."""
    with TOKENIZING:
        return tokenizer(text, **options)


@dataclass(frozen=True)
class Context:
    """key: of its content. mask: where it acts, at the output's size; None: everywhere."""

    key: str
    pixels: Pixels
    weight: float
    mask: Pixels | None = None


def weighted_contexts(request: Request, slots: int) -> list[Context]:
    """In the order of their content, so that their order in the row cannot change a bit. Raises RowError
    where they are more than the model has slots, or the weights or masks are not theirs."""
    given = request.settings.context_weights or [1.0] * len(request.contexts)
    masks = request.masks or (None,) * len(request.contexts)
    for name, values in (("context_weights", given), ("context_masks", masks)):
        if len(values) != len(request.contexts):
            message = f"{name} has {len(values)} values for {len(request.contexts)} contexts"
            raise RowError(ErrorCode.INVALID_SETTING, message)
    if len(request.contexts) > slots:
        raise RowError(
            ErrorCode.TOO_MANY_CONTEXTS, f"{len(request.contexts)} contexts, the model takes at most {slots}"
        )
    found = (
        Context(content_key(pixels), pixels, weight, mask)
        for pixels, weight, mask in zip(request.contexts, given, masks, strict=True)
    )
    return sorted(found, key=lambda context: (context.key, context.weight, content_key(context.mask)))


def control_scales(request: Request, networks: int) -> list[float]:
    """Of each ControlNet. Raises RowError where the row's control maps or scales are not as many."""
    scales = request.settings.controlnet_conditioning_scale
    scales = scales if isinstance(scales, list) else [scales] * networks
    for what, count in (
        ("control maps", len(request.controls)),
        ("values of controlnet_conditioning_scale", len(scales)),
    ):
        if count != networks:
            raise RowError(ErrorCode.INVALID_SETTING, f"{count} {what}, the model has {networks} ControlNets")
    return scales


def content_key(pixels: Pixels | None) -> str:
    """Return a key of an image's content; the same for any two that are None."""
    if pixels is None:
        return ""
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest() + str(pixels.shape)


def slots_of(tokens: list[Tensor], weights: list[float], slots: int) -> tuple[Tensor, Tensor]:
    """Tokens (1, K, D) each -> (1, slots, K, D) with the weights (1, slots), zeros where there is none."""
    shown = torch.cat(tokens)
    filled = shown.new_zeros(1, slots, *shown.shape[1:])
    filled[0, : len(shown)] = shown
    padded = torch.zeros(1, slots, device=shown.device)
    padded[0, : len(weights)] = torch.tensor(weights)
    return filled, padded


def latent_size(request: Request, factor: int) -> tuple[int, int]:
    """Return height and width of a row's latents. factor: pixels a side of a latent."""
    width, height = request.output_size
    return height // factor, width // factor


def to_tensor(pixels: Pixels, device: torch.device | str = "cpu") -> Tensor:
    """Copy pixels, uint8 (H, W, 3), to a batch of one on the device, uint8 (1, 3, H, W)."""
    return pinned(channels_first(pixels.copy())[None], torch.device(device))
