"""Compiling a model's networks with torch.compile, block by block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux2 import (
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from torch import nn

from context_diffusion.core.errors import ModelError

Compile = Literal["auto", "off"]
VARIANTS = 4096  # of the compiled blocks, over all shapes
# What networks consist of, many times over.
BLOCKS = (BasicTransformerBlock, ResnetBlock2D, Flux2TransformerBlock, Flux2SingleTransformerBlock)


def wants_compilation(compile_key: Compile, device: torch.device) -> bool:
    """Return whether networks are compiled: with `auto` on a GPU, where it pays. Raises ModelError where they
    cannot be."""
    if compile_key == "off" or device.type != "cuda":
        return False
    if missing := _missing():
        raise ModelError(f"compiling the model needs {missing}: install it, or set cluster.compile: off")
    return True


def _missing() -> str | None:
    """Return what torch.compile lacks on this machine to compile for a GPU."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton"
    compiler = os.environ.get("CC")
    if not any(map(shutil.which, [compiler] if compiler else ["cc", "gcc", "clang"])):
        return "a C compiler (gcc or clang, or the one that CC names)"
    return None


def compile_blocks(networks: Iterable[nn.Module]) -> None:
    """Compile each block of the networks in place, one graph a block. torch keeps the code on disk
    (TORCHINDUCTOR_CACHE_DIR), where the engines of a node share it."""
    # All blocks of a class count as variants of one function, and there are more of them than torch expects.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, VARIANTS)
    for network in networks:
        for block in network.modules():
            if isinstance(block, BLOCKS):
                block.compile(fullgraph=True, dynamic=False)
