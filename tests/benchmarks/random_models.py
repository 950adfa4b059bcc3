"""Stable Diffusion 1.5 and XL with random weights in their published shapes, in the public formats: a base, a
ControlNet, ViT-H/14 as image encoder and IP-Adapter Plus, as the product's presets sd15 and sdxl have them.
Or the same parts, tiny.

Knows no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_diffusers import (
    make_base,
    make_controlnet,
    make_image_encoder,
    make_ip_adapter,
    make_tokenizer,
    save_ip_adapter,
)

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# Of the text encoders: ViT-L of CLIP, ViT-bigG of OpenCLIP; and of the image encoder, ViT-H of OpenCLIP.
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VIT_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
GATE_STD = 0.02  # of the ControlNet's last convolutions, which are 0 before it is trained


def unet_of(xl: bool) -> Any:
    if xl:
        return UNet2DConditionModel(sample_size=128, **SDXL, **UP)
    return UNet2DConditionModel(sample_size=64, **SD15)


def controlnet_of(xl: bool) -> Any:
    return ControlNetModel(**(SDXL if xl else SD15))


def vae_of(xl: bool) -> Any:
    own = {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False} if xl else {}
    return AutoencoderKL(**VAE, **({"sample_size": 512} | own))


def image_encoder_of() -> Any:
    config = CLIPVisionConfig(**VIT_H, hidden_act="gelu", patch_size=14, image_size=224, projection_dim=1024)
    return CLIPVisionModelWithProjection(config)


def projection_of(xl: bool) -> Any:
    heads, width = (20, 2048) if xl else (12, 768)
    return IPAdapterPlusImageProjection(
        VIT_H["hidden_size"], width, hidden_dims=64 * heads, depth=4, dim_head=64, heads=heads, num_queries=16
    )


def text_encoder_of(kind: Any, sizes: dict[str, int], tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        **sizes,
        vocab_size=49408,
        hidden_act="quick_gelu" if sizes is VIT_L else "gelu",
        projection_dim=sizes["hidden_size"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def write_model(
    folder: Path, xl: bool, device: torch.device, dtype: torch.dtype, tiny: bool
) -> dict[str, Any]:
    """Write all parts, in `dtype`, and return the `model:` mapping. device: where random numbers are
    drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    if tiny:
        base = make_base(folder, xl)
        parts = {"controlnet": make_controlnet(folder, xl), "image_encoder": make_image_encoder(folder)}
        return {"base": base, **parts, **make_ip_adapter(folder, base, plus=True, xl=xl)}
    torch.manual_seed(0)
    with torch.no_grad(), made_on(device, dtype):
        unet = unet_of(xl)
        width = unet.config.cross_attention_dim
        adapter = save_ip_adapter(folder / "ip_adapter", unet, projection_of(xl), width, std=width**-0.5)
        _write_base(folder, xl, unet)
        del unet
        controlnet = controlnet_of(xl)
        for name, parameter in controlnet.named_parameters():
            if "controlnet_" in name and not parameter.any():
                parameter.normal_(std=GATE_STD)
        controlnet.save_pretrained(folder / "controlnet")
        image_encoder_of().save_pretrained(folder / "image_encoder")
    return {
        "base": str(folder / "base"),
        "controlnet": str(folder / "controlnet"),
        "image_encoder": str(folder / "image_encoder"),
        **adapter,
    }


def _write_base(folder: Path, xl: bool, unet: Any) -> None:
    tokenizer = make_tokenizer(folder / "words")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    parts: dict[str, Any] = {
        "vae": vae_of(xl),
        "unet": unet,
        "scheduler": scheduler,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder_of(CLIPTextModel, VIT_L, tokenizer),
    }
    if xl:
        second = text_encoder_of(CLIPTextModelWithProjection, VIT_G, tokenizer)
        pipe: Any = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder / "base")


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make tensors on a device and in a dtype, so that billions of random numbers are drawn there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
