"""Whether a base's networks go together and generate images from text, by their configurations. Knows no
torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts

NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
XL_NEEDED = (*NEEDED, "tokenizer_2", "text_encoder_2")
LATENT_CHANNELS = 4  # the default of diffusers' autoencoder
PIXEL_CHANNELS = 3


def check_networks(
    parts: Parts, index: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any], xl: bool
) -> None:
    """Raise ModelError for a base whose rows would all fail.

    index: its model_index.json. unet, vae: the configurations of its U-Net and of the autoencoder that is
    used."""
    absent = [name for name in (XL_NEEDED if xl else NEEDED) if name in index and not any(index[name] or [])]
    reason = f"it has no {', '.join(absent)}" if absent else next(_mismatches(parts, unet, vae, xl), None)
    if reason:
        raise ModelError(
            f"model: {parts.base} cannot be used: {reason}; expected a model that generates images from "
            "text, not a refiner or one for inpainting, editing or upscaling"
        )


def _mismatches(parts: Parts, unet: Mapping[str, Any], vae: Mapping[str, Any], xl: bool) -> Iterator[str]:
    """Yield what distinguishes a base's networks from those of a text-to-image model."""
    autoencoder = f"autoencoder {parts.vae}" if parts.vae else "its autoencoder"
    latents = vae.get("latent_channels", LATENT_CHANNELS)
    for verb, name in (("reads", "in_channels"), ("predicts", "out_channels")):
        if (channels := unet.get(name, LATENT_CHANNELS)) != latents:
            yield f"its U-Net {verb} {channels} channels, the latents of {autoencoder} have {latents}"
    if (pixels := vae.get("out_channels", PIXEL_CHANNELS)) != PIXEL_CHANNELS:
        yield f"{autoencoder} decodes to {pixels} channels, not {PIXEL_CHANNELS}"
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        yield "its U-Net reads class labels"
    if (added := unet.get("addition_embed_type")) != ("text_time" if xl else None):
        yield f"its U-Net has the addition_embed_type {added}"
