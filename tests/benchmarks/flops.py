"""Floating-point operations of the engine against diffusers' pipelines, in the shapes of FLUX.2 [klein] 4B,
SD 1.5 and SDXL.

    python tests/benchmarks/flops.py

Nothing is computed: the modules stand on torch's meta device, in their published configurations, and torch's
FLOP counter adds up what a call would cost.

Stable Diffusion: the engine's side is what models/stable_diffusion/backbone.py runs, lanes full, with all
slots for contexts; the reference is what one must run with diffusers for rows of mixed guidance in one batch:
both guidance branches of every row through U-Net and ControlNet at each step, keys, values and the control
map's embedding with them. Decoding counts on both sides, encoders on none.

FLUX.2 [klein]: one row on both sides, with all that it runs: the text encoder, the autoencoder, the steps.
The engine's references are padded where chunks have several lanes (on a CPU), and not on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_rows import EIGHTHS, MIXED_REFERENCES, REFERENCES, Sizes
from random_flux2 import KLEIN_4B, text_encoder_of, transformer_of
from random_flux2 import vae_of as flux2_vae_of
from random_models import controlnet_of, unet_of, vae_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from context_diffusion.models.attention import LaneInputs, attend_by_lanes, keys_and_values
from context_diffusion.models.flux2.loading import take_apart
from context_diffusion.models.flux2.prompts import LENGTH
from context_diffusion.models.flux2.references import padded_length
from context_diffusion.models.flux2.transformer import LaneTokens, predict, prepare

TEXT, CONTEXT = 77, 16  # tokens of a prompt, and of a context by IP-Adapter Plus
SLOTS = 8  # contexts that a row of the engine has room for
SIDE = 1024  # of an output of FLUX.2, in pixels
TOKEN = 16  # pixels a side


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


@dataclass
class Flux2Costs:
    """FLOPs of a row of FLUX.2: all steps, the text encoder, the encoder of the references, the decoder."""

    steps: float
    text: float
    references: float
    decode: float

    @property
    def all(self) -> float:
        return sum(asdict(self).values())


class Flux2Counter:
    """Counts what a row of FLUX.2 [klein] 4B costs in the engine and in diffusers' pipeline."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.theirs, self.ours = transformer_of(KLEIN_4B), transformer_of(KLEIN_4B)
            self.vae = flux2_vae_of(KLEIN_4B)
            encoder = text_encoder_of(KLEIN_4B)
            read = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long), "output_hidden_states": True}
            self.text_theirs = flops_of(lambda: encoder(**read))
            take_apart(encoder, "")
            self.text_ours = flops_of(lambda: encoder.model(**read))
            prepare(self.ours)
            text = torch.empty(1, LENGTH, KLEIN_4B.transformer["joint_attention_dim"])
            self.text_ours += flops_of(lambda: self.ours.context_embedder(text))

    def engine(self, references: Sizes, steps: int, padded: bool) -> Flux2Costs:
        """references: heights and widths in eighths of SIDE. padded: their tokens are."""
        used = _tokens_of(references)
        length = padded_length(used) if padded else used
        step = self._engine_step(length, biased=length > used)
        return Flux2Costs(steps * step, self.text_ours, *self._autoencoder(references))

    def diffusers(self, references: Sizes, steps: int) -> Flux2Costs:
        step = self._diffusers_step(_tokens_of(references))
        return Flux2Costs(steps * step, self.text_theirs, *self._autoencoder(references))

    def _engine_step(self, references: int, biased: bool) -> float:
        output, config = (SIDE // TOKEN) ** 2, self.ours.config
        total = LENGTH + output + references
        with torch.device("meta"):
            rotation = torch.empty(1, total, 1, config.attention_head_dim)
            lanes = LaneTokens(
                torch.empty(1, LENGTH, self.ours.inner_dim),
                torch.empty(1, references, config.in_channels),
                rotation,
                rotation,
                torch.empty(1, 1, 1, total) if biased else None,
            )
            latents, timesteps = torch.empty(1, output, config.in_channels), torch.empty(1)
            return flops_of(lambda: predict(self.ours, latents, timesteps, lanes))

    def _diffusers_step(self, references: int) -> float:
        images, config = (SIDE // TOKEN) ** 2 + references, self.theirs.config
        with torch.device("meta"):
            inputs = {
                "hidden_states": torch.empty(1, images, config.in_channels),
                "encoder_hidden_states": torch.empty(1, LENGTH, config.joint_attention_dim),
                "timestep": torch.empty(1),
                "img_ids": torch.empty(1, images, 4, dtype=torch.long),
                "txt_ids": torch.empty(1, LENGTH, 4, dtype=torch.long),
            }
            return flops_of(lambda: self.theirs(**inputs))

    def _autoencoder(self, references: Sizes) -> tuple[float, float]:
        """Return the FLOPs of encoding references and of decoding an output."""
        unit = SIDE // EIGHTHS
        with torch.device("meta"):
            images = [torch.empty(1, 3, height * unit, width * unit) for height, width in references]
            latents = torch.empty(1, self.vae.config.latent_channels, SIDE // 8, SIDE // 8)
            encode = sum(flops_of(partial(self.vae.encode, image)) for image in images)
            return encode, flops_of(lambda: self.vae.decode(latents))


def _tokens_of(references: Sizes) -> int:
    return sum(height * width for height, width in references) * (SIDE // EIGHTHS // TOKEN) ** 2


def tell_flux2(steps: int) -> None:
    """Print both sides' FLOPs of rows of FLUX.2 [klein]."""
    counter = Flux2Counter()
    small, large = (4, 4), (8, 8)
    for name, references in (
        ("two references of 512 px", (small, small)),
        ("two of 1024 px", (large, large)),
        ("one of 1024 px and two of 512 px", REFERENCES),
    ):
        ours, theirs = counter.engine(references, steps, padded=False), counter.diffusers(references, steps)
        for side, cost in (("engine", ours), ("diffusers", theirs)):
            parts = ", ".join(f"{part} {value / 1e12:.2f}" for part, value in asdict(cost).items())
            print(f"FLUX.2 [klein] 4B {SIDE} px, {steps} steps, {name}, {side}, TFLOP: {parts}")
        print(f"  engine {ours.all / 1e12:.1f} of {theirs.all / 1e12:.1f} TFLOP: {ours.all / theirs.all:.3f}")
    theirs_all = sum(counter.diffusers(sizes, steps).all for sizes in MIXED_REFERENCES)
    for padded in (False, True):
        ratios = [
            counter.engine(sizes, steps, padded).all / counter.diffusers(sizes, steps).all
            for sizes in MIXED_REFERENCES
        ]
        ours_all = sum(counter.engine(sizes, steps, padded).all for sizes in MIXED_REFERENCES)
        how = "padded" if padded else "without padding"
        print(
            f"  mixed references row by row, {how}: engine to diffusers "
            f"{ours_all / theirs_all:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def main() -> None:
    tell_flux2(steps=4)
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
