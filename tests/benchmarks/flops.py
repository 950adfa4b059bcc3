"""Floating-point operations of the engine against diffusers' pipelines, in the shapes of SD 1.5 and SDXL.

    python tests/benchmarks/flops.py

Nothing is computed: the modules stand on torch's meta device, in their published configurations, and torch's
FLOP counter adds up what a call would cost. The engine's side is what models/stable_diffusion/backbone.py
runs, lanes full, with all slots for contexts; the reference is what one must run with diffusers for rows of
mixed guidance in one batch: both guidance branches of every row through U-Net and ControlNet at each step,
keys, values and the control map's embedding with them. Decoding counts on both sides, encoders on none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from random_models import controlnet_of, unet_of, vae_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from context_diffusion.models.attention import LaneInputs, attend_by_lanes, keys_and_values

TEXT, CONTEXT = 77, 16  # tokens of a prompt, and of a context by IP-Adapter Plus
SLOTS = 8  # contexts that a row of the engine has room for


@dataclass
class Costs:
    """FLOPs. A step of one lane: unet and net of the engine, unet_full and net_full of diffusers, without
    contexts. Once: text, a prompt's keys and values; context, those of one context; map, the embedding of the
    control map; decode. attend: a step's attention of one lane to one context."""

    unet_full: float
    net_full: float
    unet: float
    net: float
    text: float
    context: float
    attend: float
    map: float
    decode: float


def flops_of(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def costs(xl: bool) -> Costs:
    with torch.device("meta"):
        unet, net, vae = unet_of(xl), controlnet_of(xl), vae_of(xl)
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        latents, time, text = torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, TEXT, width)
        image = torch.empty(1, 3, 8 * side, 8 * side)
        hint = torch.empty(1, net.config.block_out_channels[0], side, side)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if xl else {}
        bias, scale = torch.empty(1, 1, 1, SLOTS * CONTEXT), torch.empty(1, 1, 1)
    unet_full = flops_of(lambda: unet(latents, time, text, added_cond_kwargs=added))
    net_full = flops_of(lambda: net(latents, time, text, image, added_cond_kwargs=added))
    map_embedding = flops_of(lambda: net.controlnet_cond_embedding(image))
    decode = flops_of(lambda: vae.decode(latents))
    layers, net_layers = attend_by_lanes(unet), attend_by_lanes(net)
    net.controlnet_cond_embedding = nn.Identity()
    keys, net_keys = keys_and_values(layers, text), keys_and_values(net_layers, text)
    contexts = tuple(_tokens(key, SLOTS * CONTEXT) for key in keys)

    def step(lanes: LaneInputs) -> float:
        given = {"lanes": lanes}
        return flops_of(
            lambda: unet(latents, time, None, added_cond_kwargs=added, cross_attention_kwargs=given)
        )

    with_contexts = step(LaneInputs(keys, None, contexts, bias, scale))
    without = step(LaneInputs(keys))
    given = {"lanes": LaneInputs(net_keys)}
    net_step = flops_of(
        lambda: net(latents, time, None, hint, added_cond_kwargs=added, cross_attention_kwargs=given)
    )
    unet_text = flops_of(lambda: keys_and_values(layers, text))
    return Costs(
        unet_full,
        net_full,
        with_contexts,
        net_step,
        unet_text + flops_of(lambda: keys_and_values(net_layers, text)),
        unet_text * CONTEXT / TEXT,  # of layers of the same shapes
        (with_contexts - without) / SLOTS,
        map_embedding,
        decode,
    )


def _tokens(key: Tensor, count: int) -> Tensor:
    return key.new_empty(1, count, key.shape[2])


def row_cost(c: Costs, steps: int, lanes: int, contexts: int) -> float:
    """Return the FLOPs of a row in the engine."""
    return steps * lanes * (c.unet + c.net) + lanes * c.text + contexts * c.context + c.map + c.decode


def reference_cost(c: Costs, steps: int, contexts: int) -> float:
    """Return the FLOPs of a row in diffusers, in a batch with both branches: contexts are projected to keys
    and values at every step."""
    return steps * 2 * (c.unet_full + c.net_full + contexts * (c.context + c.attend)) + c.decode


def main() -> None:
    for name, xl, steps in (("SD 1.5 512 px", False, 20), ("SDXL 1024 px", True, 30)):
        found = costs(xl)
        print(
            f"{name}, GFLOP: {', '.join(f'{part} {cost / 1e9:.1f}' for part, cost in asdict(found).items())}"
        )
        reference = reference_cost(found, steps, contexts=2)
        for kind, lanes in (("guidance 1", 1), ("guided", 2), ("three branches", 3)):
            ours = row_cost(found, steps, lanes, contexts=2)
            print(
                f"{name}, {steps} steps, 2 contexts, {kind}: {ours / 1e12:.1f} of {reference / 1e12:.1f} "
                f"TFLOP: {ours / reference:.3f}"
            )


if __name__ == "__main__":
    main()
