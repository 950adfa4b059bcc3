"""Style similarity in a context encoder's space: how similar an image and its contexts are to the encoder.

N images  K tokens  D width  H W pixels
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from context_diffusion.core.records import Pixels
from context_diffusion.image_tensors import channels_first
from context_diffusion.inputs.decode import resize
from context_diffusion.models.context_encoders import load_encoder, patch_tokens
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolve import model_folder
from context_diffusion.storage.content_cache import ContentCache

EMBEDDING_CACHE = ContentCache(16 * 2**20)
Embed = Callable[[list[Pixels]], Tensor]  # uint8 (H, W, 3) each -> (N, D)


@cache
def load_embedding(name: str = "bundled") -> Embed:
    """Load the context encoder of a native model (`bundled`, or its folder), or CLIP, SigLIP or DINOv2 by
    folder or hub id, once a process. Raises ModelError."""
    if name == "bundled" or (Path(name) / "model_index.json").is_file():
        model = NativeModel.from_pretrained(model_folder(name))
        return lambda images: model.encode_images(_batch(images, model.context_size)).mean(1)
    encoder = load_encoder(name)
    mean, std = (torch.tensor(part)[:, None, None] for part in (encoder.mean, encoder.std))

    def embed(images: list[Pixels]) -> Tensor:
        tokens = patch_tokens(encoder.model, (_batch(images, encoder.size) / 255 - mean) / std)
        return torch.cat([tokens.mean(1), tokens.std(1)], 1)

    return embed


def _batch(images: list[Pixels], size: int) -> Tensor:
    """Resize images and join them to uint8 (N, 3, size, size)."""
    return channels_first([resize(image, size, size, "crop") for image in images])


@torch.inference_mode()
def embedded(images: list[Pixels], encoder: str = "bundled") -> NDArray[np.float64]:
    """Embed images as features (N, D)."""
    return load_embedding(encoder)(images).double().numpy()


@torch.inference_mode()
def style_similarity(image: Pixels, contexts: list[Pixels], encoder: str = "bundled") -> float:
    """Return the cosine between an image's mean token and that of its contexts, 0 to 1."""
    output, *references = (torch.from_numpy(_embedded_once(pixels, encoder)) for pixels in (image, *contexts))
    return float(F.cosine_similarity(output, torch.stack(references).mean(0), dim=0).clamp(0, 1))


def _embedded_once(image: Pixels, encoder: str) -> NDArray[np.float32]:
    def embed() -> NDArray[np.float32]:
        return load_embedding(encoder)([image])[0].numpy()

    return EMBEDDING_CACHE.get(image.tobytes(), (encoder, image.shape), embed)
