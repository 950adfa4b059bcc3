"""FLUX.2 [klein] 4B with random weights in its published shapes, as diffusers saves it; or narrower, or tiny.

The tokenizer is that of the tests: one token a byte. Knows no engine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from random_models import made_on
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_flux2 import save_tiny_klein

LOUDER = 2.5  # factor of the transformer's matrices: at birth, another reference would hardly move the image
IMAGE_STD = 0.4  # of decoded noise, in -1 to 1


@dataclass(frozen=True)
class Shapes:
    """The configurations of the networks, where they are not the classes' defaults."""

    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]


KLEIN_4B = Shapes(
    transformer={
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 3 * 2560,
        "axes_dims_rope": (32, 32, 32, 32),
    },
    text_encoder={
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    vae={"latent_channels": 32},
)
# So wide that most of the time on a CPU is arithmetic.
NARROW = Shapes(
    transformer={
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "joint_attention_dim": 3 * 64,
        "axes_dims_rope": (16, 16, 16, 16),
    },
    text_encoder={
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
    vae={
        "latent_channels": 16,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
)


def transformer_of(shapes: Shapes) -> Any:
    return Flux2Transformer2DModel(
        **shapes.transformer, mlp_ratio=3.0, rope_theta=2000, guidance_embeds=False
    )


def text_encoder_of(shapes: Shapes) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**shapes.text_encoder, tie_word_embeddings=True))


def vae_of(shapes: Shapes) -> Any:
    return AutoencoderKLFlux2(**shapes.vae)


def write_flux2(
    folder: Path, shapes: Shapes | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Write a distilled model, in `dtype`, and return the `model:` mapping. shapes: None: the tests' tiny
    model, in float32. device: where random numbers are drawn."""
    tiny = save_tiny_klein(folder / "tiny")
    if shapes is None:
        return {"base": str(tiny)}
    tests = Flux2KleinPipeline.from_pretrained(tiny)
    torch.manual_seed(0)
    with torch.no_grad(), made_on(device, dtype):
        pipe = Flux2KleinPipeline(
            scheduler=tests.scheduler,
            vae=_scaled_vae(vae_of(shapes)),
            text_encoder=text_encoder_of(shapes),
            tokenizer=tests.tokenizer,
            transformer=_louder(transformer_of(shapes)),
            is_distilled=True,
        )
    pipe.save_pretrained(folder / "base")
    return {"base": str(folder / "base")}


def _louder(transformer: Any) -> Any:
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            parameter.mul_(LOUDER)
    return transformer


def _scaled_vae(vae: Any) -> Any:
    """Give an autoencoder the statistics of its own latents, and a decoder that fills the range of pixels."""
    patches = F.pixel_unshuffle(vae.encode(torch.rand(1, 3, 256, 256) * 2 - 1).latent_dist.mode(), 2)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))
    noise = torch.randn_like(patches) * patches.std((0, 2, 3), keepdim=True) + patches.mean(
        (0, 2, 3), keepdim=True
    )
    decoded = vae.decode(F.pixel_shuffle(noise, 2)).sample
    vae.decoder.conv_out.weight.mul_(IMAGE_STD / decoded.std((0, 2, 3))[:, None, None, None])
    vae.decoder.conv_out.bias.sub_(decoded.mean((0, 2, 3)))
    return vae
