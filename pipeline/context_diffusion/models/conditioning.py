"""What several kinds of backbone make of a request's contexts and prompts."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Pixels, Request, check_contexts
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
    """Return the contexts with weights and masks, sorted by content, so that their order in the row cannot
    change a bit. Raises RowError where they are more than the model's slots, or not as many as the weights or
    masks."""
    given = request.settings.context_weights or [1.0] * len(request.contexts)
    masks = request.masks or (None,) * len(request.contexts)
    check_contexts(len(request.contexts), slots, context_weights=given, context_masks=request.masks)
    contexts = (
        Context(content_key(pixels), pixels, weight, mask)
        for pixels, weight, mask in zip(request.contexts, given, masks, strict=True)
    )
    return sorted(contexts, key=lambda context: (context.key, context.weight, content_key(context.mask)))


def control_scales(request: Request, networks: int) -> list[float]:
    """Return the scale of each ControlNet. Raises RowError where the row's control maps or scales are not as
    many."""
    if (count := len(request.controls)) != networks:
        message = f"{count} control maps, the model has {networks} ControlNets"
        raise RowError(ErrorCode.INVALID_SETTING, message)
    try:
        return request.settings.by_controlnet("controlnet_conditioning_scale", networks)
    except ValueError as error:
        raise RowError(ErrorCode.INVALID_SETTING, str(error)) from None


def content_key(pixels: Pixels | None) -> str:
    """Return a key of an image's content; the same for any two that are None."""
    if pixels is None:
        return ""
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest() + str(pixels.shape)


def slots_of(tokens: list[Tensor], weights: list[float], slots: int) -> tuple[Tensor, Tensor]:
    """Pad each context's tokens (1, K, D) to (1, slots, K, D), and their weights to (1, slots), with
    zeros."""
    joined = torch.cat(tokens)
    padded_tokens = joined.new_zeros(1, slots, *joined.shape[1:])
    padded_tokens[0, : len(joined)] = joined
    padded_weights = torch.zeros(1, slots, device=joined.device)
    padded_weights[0, : len(weights)] = torch.tensor(weights)
    return padded_tokens, padded_weights


def latent_size(request: Request, factor: int) -> tuple[int, int]:
    """Return height and width of a row's latents. factor: pixels a side of a latent."""
    width, height = request.output_size
    return height // factor, width // factor


def to_tensor(pixels: Pixels, device: torch.device | str = "cpu") -> Tensor:
    """Copy pixels, uint8 (H, W, 3), to a batch of one on the device, uint8 (1, 3, H, W)."""
    return pinned(channels_first(pixels.copy())[None], torch.device(device))
