"""The engine on the bundled model against a plain diffusers loop with the same components, in one run.

    python tests/benchmarks/engine.py [--rows 16]

The loop is what one writes with diffusers: rows one after the other, each with its scheduler's `step` and both guidance
branches in one batch. Uniform rows: 20 steps, guidance 1.5. Mixed rows: 10 to 30 steps, guidance 1 and 1.5.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from diffusers import DDIMScheduler

from context_diffusion.config import Settings
from context_diffusion.control import control_map
from context_diffusion.engine.engine import Engine
from context_diffusion.model.native import NativeModel
from context_diffusion.pipeline import SHAPES, ContextDiffusion
from context_diffusion.schema import Request


def rows(count: int, mixed: bool) -> list[Request]:
    rng = np.random.default_rng(1)
    made = []
    for number in range(count):
        query, *contexts = rng.integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
        steps, guidance = (int(rng.integers(10, 31)), float(rng.choice([1.0, 1.5]))) if mixed else (20, 1.5)
        settings = Settings(seed=number, num_inference_steps=steps, guidance_scale=guidance)
        made.append(Request(str(number), 0, query, control_map(query, "gray"), "gray", tuple(contexts), None, None, settings))
    return made


@torch.inference_mode()
def loop(model: NativeModel, requests: list[Request]) -> None:
    for one in requests:
        scheduler = DDIMScheduler.from_config(model.scheduler_config)
        scheduler.set_timesteps(one.settings.num_inference_steps)
        assert one.control is not None
        pixels = [torch.from_numpy(p.copy()).permute(2, 0, 1)[None] for p in (one.control, *one.contexts)]
        tokens = model.encode_images(torch.cat(pixels[1:]))
        contexts = tokens.new_zeros(2, model.context_slots, *tokens.shape[1:])
        contexts[:, : len(tokens)] = tokens
        weights = torch.zeros(2, model.context_slots)
        weights[1, : len(tokens)] = 1
        hidden, bias = model.fuse(*model.encode_text(["", ""]), contexts, weights)
        guidance, layout = one.settings.guidance_scale, model.encode_control(pixels[0], ["gray"])
        latents = (
            torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(one.settings.seed or 0))
            * model.noise_scale
        )
        for timestep in scheduler.timesteps:
            both, times = latents.expand(2, -1, -1, -1), timestep.expand(2).float()
            down, mid = model.control(both, times, layout.expand(2, -1, -1, -1))
            without, shown = model.predict(both, times, hidden, bias, down, mid).chunk(2)
            latents = scheduler.step(without + guidance * (shown - without), timestep, latents).prev_sample
        model.decode(latents)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, default=16)
    given = arguments.parse_args()
    pipeline = ContextDiffusion.from_pretrained(device="cpu")
    chunk, lanes = SHAPES["cpu"]
    for name, mixed in (("uniform", False), ("mixed", True)):
        ours, theirs = [], []
        for _ in range(3):  # side by side, in turns: the machine's mood is the same for both
            requests, started = rows(given.rows, mixed), time.perf_counter()
            engine = Engine(pipeline.model, pipeline.device, chunk, lanes)
            list(engine.run(requests))
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            loop(pipeline.model, requests)
            theirs.append(time.perf_counter() - started)
        mine, other = sorted(ours)[1], sorted(theirs)[1]
        print(
            f"{name}: engine {given.rows / mine:.2f} pictures/s, diffusers loop {given.rows / other:.2f}, "
            f"ratio {other / mine:.2f}; occupancy {engine.used_lane_steps / engine.paid_lane_steps:.3f}"
        )


if __name__ == "__main__":
    main()
