"""Whether a base's networks and its ControlNets go together and generate images from text. Knows no
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
AUTOENCODER = "AutoencoderKL"
SHARED = ("in_channels", "block_out_channels", "layers_per_block")
TEXT_WIDTH = "cross_attention_dim"  # read where a block attends to the text
# Options that add inputs, and that make attention another one than that of Stable Diffusion.
UNREAD = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "only_cross_attention",
    "dual_cross_attention",
)
UNLIKE = ("SimpleCrossAttn", "KCrossAttn")  # blocks


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
    if (kind := vae.get("_class_name", AUTOENCODER)) != AUTOENCODER:
        yield f"{autoencoder} is a {kind}, not an {AUTOENCODER}"
    latents = vae.get("latent_channels", LATENT_CHANNELS)
    for verb, name in (("reads", "in_channels"), ("predicts", "out_channels")):
        if (channels := unet.get(name, LATENT_CHANNELS)) != latents:
            yield f"its U-Net {verb} {channels} channels, the latents of {autoencoder} have {latents}"
    if (pixels := vae.get("out_channels", PIXEL_CHANNELS)) != PIXEL_CHANNELS:
        yield f"{autoencoder} decodes to {pixels} channels, not {PIXEL_CHANNELS}"
    if (added := unet.get("addition_embed_type")) != ("text_time" if xl else None):
        yield f"its U-Net has the addition_embed_type {added}"
    if reason := _other_inputs(unet):
        yield f"its U-Net has {reason}"


def check_controlnet(name: str, network: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raise ModelError for a ControlNet that does not fit a U-Net, or that acts in another way than by maps.
    network, unet: their configurations."""
    for option in (*SHARED, *([TEXT_WIDTH] if _attends(network) else [])):
        value, base_value = _by_block(network, option), _by_block(unet, option)
        if value != base_value:
            raise ModelError(
                f"model: controlnet {name} does not fit the base: its {option} is {value}, that of the "
                f"base {base_value}"
            )
    if (channels := network.get("conditioning_channels", PIXEL_CHANNELS)) != PIXEL_CHANNELS:
        raise ModelError(
            f"model: controlnet {name} reads maps of {channels} channels, control maps have {PIXEL_CHANNELS}"
        )
    if network.get("global_pool_conditions"):
        raise ModelError(
            f"model: controlnet {name} has global_pool_conditions: it reads no layout, which is not supported"
        )
    if reason := _other_inputs(network):
        raise ModelError(f"model: controlnet {name} has {reason}, which is not supported")


def _attends(network: Mapping[str, Any]) -> bool:
    """Return whether a ControlNet attends to the text, as the small ones of XL do not."""
    kinds = (*(network.get("down_block_types") or ()), network.get("mid_block_type", "CrossAttn"))
    return any("CrossAttn" in str(kind) for kind in kinds)


def _by_block(config: Mapping[str, Any], option: str) -> Any:
    """Return an option's value, that of layers_per_block for each block."""
    value = config.get(option)
    if option == "layers_per_block" and isinstance(value, int):
        return [value] * len(config.get("block_out_channels") or ())
    return list(value) if isinstance(value, tuple) else value


def _other_inputs(config: Mapping[str, Any]) -> str | None:
    """Return the option of a U-Net or ControlNet by which it reads what no row has, or attends otherwise."""
    for option in UNREAD:
        value = config.get(option)
        if any(value) if isinstance(value, list | tuple) else value:
            return option
    kinds = [*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ())]
    return next((kind for kind in kinds if str(kind).startswith(UNLIKE)), None)
