"""Floating-point operations of the engine against diffusers' pipelines, in the shapes of SD 1.5 and SDXL.

    python tests/benchmarks/flops.py

Nothing is computed: the modules stand on torch's meta device, in their published configurations, and torch's
FLOP counter adds up what a call would cost. The engine's side is models/stable_diffusion/backbone.py itself,
lanes full; the reference is what one must run with diffusers for rows of mixed guidance in one batch: both
guidance branches of every row through U-Net and ControlNet at each step, keys, values and the control map's
embedding with them. Encoders and decoding count on both sides."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from context_diffusion.engine.model_calls import stack
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from context_diffusion.models.attention import attend_by_lanes, keys_and_values

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
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
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT, CONTEXT = 77, 16  # tokens of a prompt, and of a context by IP-Adapter Plus


def cost(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def costs(config: dict[str, Any], xl: bool) -> SimpleNamespace:
    """FLOPs of each part, for one lane or one row."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, **(UP if xl else {}))
        net = ControlNetModel(**{k: v for k, v in config.items() if k != "sample_size"})
        vae = AutoencoderKL(**VAE, latent_channels=4)
    side, width = config["sample_size"], config["cross_attention_dim"]
    latents, time, text = empty(1, 4, side, side), empty(1), empty(1, TEXT, width)
    added = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)} if xl else {}
    image = empty(1, 3, 8 * side, 8 * side)
    found = SimpleNamespace()
    full = cost(lambda: unet(latents, time, text, added_cond_kwargs=added))
    found.net_full = cost(lambda: net(latents, time, text, image, added_cond_kwargs=added))
    found.map = cost(lambda: net.controlnet_cond_embedding(image))
    found.decode = cost(lambda: vae.decode(latents))
    layers, net_layers = attend_by_lanes(unet, "unet."), attend_by_lanes(net, "net0.")
    net.controlnet_cond_embedding = torch.nn.Identity()
    lanes = keys_and_values(layers, text) | keys_and_values(net_layers, text)
    found.text = cost(lambda: (keys_and_values(layers, text), keys_and_values(net_layers, text)))
    context = {name: empty(1, CONTEXT, layer.to_k.out_features) for name, layer in layers.items()}
    for name, keys in context.items():
        lanes |= {f"{name}.context_k": keys, f"{name}.context_v": keys}
    lanes |= {"context_scale": empty(1, 1, 1), "context_bias": empty(1, 1, 1, CONTEXT)} | added
    given = {"lanes": stack([lanes])}
    attend = cost(
        lambda: unet(latents, time, None, added_cond_kwargs=added, cross_attention_kwargs=given)
    ) - (full - cost(lambda: keys_and_values(layers, text)))  # to the contexts alone
    hint = empty(1, config.get("block_out_channels", (320,))[0], side, side)
    found.unet = cost(
        lambda: unet(latents, time, None, added_cond_kwargs=added, cross_attention_kwargs=given)
    )
    found.net = cost(
        lambda: net(latents, time, None, hint, added_cond_kwargs=added, cross_attention_kwargs=given)
    )
    # diffusers projects the contexts' keys and values at every step too: as many numbers as a prompt's, by
    # tokens.
    unet_text = cost(lambda: keys_and_values(layers, text))
    found.context = unet_text * CONTEXT / TEXT
    found.unet_full = full + found.context + attend
    return found


def report(name: str, c: SimpleNamespace, steps: int) -> None:
    reference = steps * 2 * (c.unet_full + c.net_full) + c.decode
    kinds = {
        "guidance 1": (1, 1),
        "guided, no prompt": (2, 1),
        "guided, with a prompt": (2, 2),
        "three branches": (3, 2),
    }
    for what, (lanes, texts) in kinds.items():
        once = texts * c.text + lanes * c.context + c.map + c.decode
        ours = steps * (lanes * c.unet + texts * c.net) + once
        print(
            f"{name}, {steps} steps, {what}: {ours / 1e12:.1f} of {reference / 1e12:.1f} TFLOP: "
            f"{ours / reference:.3f}"
        )


def main() -> None:
    for name, config, xl, steps in (("SD 1.5 512 px", SD15, False, 20), ("SDXL 1024 px", SDXL, True, 30)):
        found = costs(config, xl)
        told = ", ".join(f"{part} {value / 1e9:.1f}" for part, value in vars(found).items())
        print(f"{name}, GFLOP: {told}")
        report(name, found, steps)


if __name__ == "__main__":
    main()
