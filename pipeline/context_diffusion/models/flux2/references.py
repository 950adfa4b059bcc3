"""References of FLUX.2: images as tokens with positions of their own.

N references  C channels of a token  h w tokens of an image  R tokens of all references
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.core.records import Pixels, Request, check_contexts
from context_diffusion.models.conditioning import to_tensor

APART = 10  # between the time coordinates of two references
STEPS = 8  # sizes of the references' tokens between a power of two and the next
FINEST = 16  # tokens


@dataclass(frozen=True)
class References:
    """The references of a row, the query first. weights: of each; 1 is the model's own attention."""

    images: tuple[Pixels, ...]
    weights: tuple[float, ...]

    def sizes(self, pixels: int) -> list[tuple[int, int]]:
        """Return the (h, w) of each. pixels: a side of a token."""
        return [(image.shape[0] // pixels, image.shape[1] // pixels) for image in self.images]


def references_of(request: Request, most: int) -> References:
    """Return the query and the contexts, without those of weight 0. most: references that the model takes.

    Raises RowError where there are more, or the weights are not those of the contexts."""
    settings, contexts = request.settings, request.contexts
    given = settings.context_weights or [1.0] * len(contexts)
    check_contexts(len(contexts), most - 1, context_weights=given)
    weighted = [
        (image, weight * settings.context_scale) for image, weight in zip(contexts, given, strict=True)
    ]
    references = [(request.query, 1.0), *[(image, weight) for image, weight in weighted if weight > 0]]
    return References(tuple(image for image, _ in references), tuple(weight for _, weight in references))


def padded_length(tokens: int) -> int:
    """Return the length to which so many tokens of references are padded: at most an eighth more, so that
    rows with references of slightly different sizes share a call."""
    step = max(FINEST, 2 ** max(tokens - 1, 1).bit_length() // (2 * STEPS))
    return -(-tokens // step) * step


def positions(text: int, output: tuple[int, int], sizes: Sequence[tuple[int, int]], padded: int) -> Tensor:
    """Return the positions (S, 4) of all tokens, as time, row, column and place in the text: the text, the
    output, the references, the padding.

    text: tokens. output, sizes: (h, w) of the output and of each reference."""
    parts = [torch.zeros(text, 4, dtype=torch.long)]
    parts[0][:, 3] = torch.arange(text)
    for number, (height, width) in enumerate([output, *sizes]):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        time = torch.full_like(rows, APART * number)
        parts.append(torch.stack([time, rows, columns, torch.zeros_like(rows)], 2).flatten(0, 1))
    used = sum(height * width for height, width in sizes)
    return torch.cat([*parts, torch.zeros(padded - used, 4, dtype=torch.long)])


class ImageCodec:
    """The autoencoder, whose latents in patches of 2 x 2 are tokens normalised by its own statistics."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.mean = vae.bn.running_mean.float()[None, :, None, None]
        self.std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()[None, :, None, None]

    @property
    def pixels(self) -> int:
        """A side of a token, in pixels."""
        return int(2 ** len(self.vae.config.block_out_channels))

    def encode(self, image: Pixels) -> Tensor:
        """Encode an image, uint8 (H, W, 3), to tokens (1, h·w, C)."""
        values = to_tensor(image, self.mean.device) / 255 * 2 - 1
        latents = self.vae.encode(values.to(self.vae.dtype)).latent_dist.mode()
        patches = (F.pixel_unshuffle(latents.float(), 2) - self.mean) / self.std
        return patches.flatten(2).transpose(1, 2).to(self.vae.dtype)

    def decode(self, patches: Tensor, tiled: bool) -> Tensor:
        """Decode patches (1, C, h, w) float32 to an image (1, 3, H, W) in [0, 1]."""
        latents = F.pixel_shuffle(patches * self.std + self.mean, 2).to(self.vae.dtype)
        decode = self.vae.tiled_decode if tiled else self.vae.decode
        return (decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
