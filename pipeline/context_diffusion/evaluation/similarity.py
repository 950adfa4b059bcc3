"""Style similarity: how near an image is to its contexts in the space of a context encoder.

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
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.storage.content_cache import ContentCache

EMBEDDING_CACHE = ContentCache(16 * 2**20)
Embed = Callable[[list[Pixels]], Tensor]  # uint8 (H, W, 3) each -> (N, D)


@cache
def load_embedding(name: str = "bundled") -> Embed:
    """Return the embedding of an encoder, loaded once per process. Raises ModelError.

    name: `bundled` or a native model's folder, for the context encoder of that model, or the folder or hub id
    of a CLIP, SigLIP or DINOv2 model.
    """
    if name == "bundled" or (Path(name) / "model_index.json").is_file():
        model = NativeModel.from_pretrained(model_folder(name))
        return lambda images: model.encode_images(_pixels(images, model.context_size)).mean(1)
    encoder = load_encoder(name)
    mean, std = (torch.tensor(part)[:, None, None] for part in (encoder.mean, encoder.std))

    def embed(images: list[Pixels]) -> Tensor:
        tokens = patch_tokens(encoder.model, (_pixels(images, encoder.size) / 255 - mean) / std)
        return torch.cat([tokens.mean(1), tokens.std(1)], 1)

    return embed


def _pixels(images: list[Pixels], size: int) -> Tensor:
    """Crop images to uint8 (N, 3, size, size)."""
    return channels_first([resize(image, size, size, "crop") for image in images])


@torch.inference_mode()
def embedded(images: list[Pixels], encoder: str = "bundled") -> NDArray[np.float64]:
    """Return the features (N, D) of images."""
    return load_embedding(encoder)(images).double().numpy()


@torch.inference_mode()
def style_similarity(image: Pixels, contexts: list[Pixels], encoder: str = "bundled") -> float:
    """Return the cosine between the image's embedding and the mean embedding of its contexts, 0 to 1."""
    embedding = torch.from_numpy(_cached_embedding(image, encoder))
    context_embeddings = [torch.from_numpy(_cached_embedding(context, encoder)) for context in contexts]
    return float(F.cosine_similarity(embedding, torch.stack(context_embeddings).mean(0), dim=0).clamp(0, 1))


def _cached_embedding(image: Pixels, encoder: str) -> NDArray[np.float32]:
    def embed() -> NDArray[np.float32]:
        return load_embedding(encoder)([image])[0].numpy()

    return EMBEDDING_CACHE.get(image.tobytes(), (encoder, image.shape), embed)
