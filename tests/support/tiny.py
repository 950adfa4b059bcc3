"""A native model of the real classes, small enough for a test: made once a process, random weights, no
file."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from context_diffusion.core.records import Pixels, Request
from context_diffusion.core.settings import Settings
from context_diffusion.core.training_job import Architecture
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.native.build import build
from context_diffusion.models.native.model import NativeModel

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)  # of a parameter
SIZES = Architecture(
    image_size=64,
    vae_width=16,
    latent_channels=4,
    channels=[32, 32],
    width=32,
    context_patch=16,
    context_grid=2,
    text_length=8,
)


@cache
def tiny_model() -> NativeModel:
    return make_tiny(SIZES)


@torch.no_grad()
def make_tiny(sizes: Architecture) -> NativeModel:
    torch.manual_seed(7)
    model = build(sizes, ["ocean", "dots", "forest"]).eval()
    for parameter in model.controlnet.parameters():  # louder than at birth, so that the control map shows
        if parameter.ndim == 4 and parameter.shape[-1] == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    # Random decoders are saturated, by machine: black pictures are all the same.
    channels, side = model.vae.config.latent_channels, model.latent_shape[1] * model.fold
    raw = model.vae.decode(torch.randn(4, channels, side, side)).sample
    last = model.vae.decoder.layers[-1]
    last.weight.mul_(0.3 / raw.std((0, 2, 3)).mean())
    last.bias.fill_(0.5)
    return model


@cache
def speaking_model() -> NativeModel:
    """The same, with a memory that takes every word for one that tells of a look, and whatever contexts show
    for another."""
    model = copy.copy(tiny_model())
    memory = copy.deepcopy(model.memory)
    generator = torch.Generator().manual_seed(1)
    for looks in (memory.colours, memory.colours_keys, memory.texture_keys):
        looks.copy_(torch.rand(looks.shape, generator=generator))
    memory.reliefs.copy_(torch.randint(-80, 80, memory.reliefs.shape, generator=generator))
    memory.limits.copy_(torch.tensor([-1.0, torch.inf]))
    model.memory = memory
    return model


def picture(seed: int, height: int = 64, width: int = 64) -> Pixels:
    """Coarse coloured noise."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def request(
    seed: int,
    contexts: int = 1,
    prompt: str | None = None,
    size: tuple[int, int] = (64, 64),
    **settings: object,
) -> Request:
    query = picture(seed, *size)
    kind = str(settings.pop("control", "gray"))
    return Request(
        id=f"row-{seed}",
        index=0,
        query=query,
        controls=controls_of(query, [] if kind == "disabled" else [kind]),
        contexts=tuple(picture(1000 + seed + k) for k in range(contexts)),
        prompt=prompt,
        negative_prompt=None,
        settings=Settings.model_validate({"seed": seed, "num_inference_steps": 3, **settings}),
    )
