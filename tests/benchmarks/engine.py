"""The engine on the bundled model against a loop written with diffusers on the same components, in one run.

    python tests/benchmarks/engine.py [MODEL] [--rows 48] [--repeats 5] [--threads 2] [--trace PNG]

Uniform rows: 20 steps, guidance 1.5; the other side runs full batches of 8. Mixed rows: 20 to 50 steps,
guidance 1 and 5, one to three contexts; the other side as batches in the manifest's order, padded to their
longest row and guided where any row is; and as the best static batching: rows of equal steps and guidance
together, in the batch size that is quickest. Medians of turns side by side. --trace draws the lanes of both
sides over time."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from context_diffusion.core.records import Request
from context_diffusion.core.settings import Settings
from context_diffusion.engine.engine import Engine
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.conditioning import to_tensor
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.draft import TEXTURED
from context_diffusion.models.native.draft_image import give_back
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolve import model_folder
from context_diffusion.pipeline import SHAPES
from context_diffusion.training.data.encoded_pools import drafts as drafts_of

BATCH = 8
SIZES = (1, 2, 4, 8)


def rows(count: int, mixed: bool) -> list[Request]:
    rng = np.random.default_rng(1)
    made = []
    for number in range(count):
        query, *contexts = rng.integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
        steps, guidance = (int(rng.integers(20, 51)), float(rng.choice([1.0, 5.0]))) if mixed else (20, 1.5)
        settings = Settings(seed=number, num_inference_steps=steps, guidance_scale=guidance)
        shown = tuple(contexts[: int(rng.integers(1, 4)) if mixed else 2])
        made.append(Request(str(number), 0, query, controls_of(query, ["gray"]), shown, None, None, settings))
    return made


@torch.inference_mode()
def batch(model: NativeModel, requests: list[Request]) -> None:
    """A batch as diffusers' pipelines run it: one number of steps, guidance for all or for none, both
    branches in one."""
    steps = max(one.settings.num_inference_steps for one in requests)
    guided = any(one.settings.guidance_scale > 1 for one in requests)
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(steps)
    count, branches = len(requests), 2 if guided else 1
    tokens = model.encode_images(torch.cat([to_tensor(c) for one in requests for c in one.contexts]))
    contexts = tokens.new_zeros(count, model.context_slots, *tokens.shape[1:])
    weights, start = torch.zeros(count, model.context_slots), 0
    for row, one in enumerate(requests):
        contexts[row, : len(one.contexts)] = tokens[start : start + len(one.contexts)]
        weights[row, : len(one.contexts)] = 1
        start += len(one.contexts)
    shown = torch.cat([weights * 0, weights]) if guided else weights
    text, mask = model.encode_text([""] * (branches * count))
    hidden, bias = model.fuse(text, mask, contexts.repeat(branches, 1, 1, 1), shown)
    layouts = model.encode_control(
        torch.cat([to_tensor(one.controls[0].pixels) for one in requests]), ["gray"] * count
    )
    layouts = layouts.repeat(branches, 1, 1, 1)
    made = drafts(model, requests)
    drawn = model.encode_draft(torch.cat([made * 0, made]) if guided else made)
    copies = model.decode(drawn.latents[-count:])
    noise = [
        torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(n)) for n in range(count)
    ]
    latents = torch.cat(noise) * model.noise_scale
    scales = torch.tensor([one.settings.guidance_scale for one in requests])[:, None, None, None]
    for timestep in scheduler.timesteps:
        both, times = latents.repeat(branches, 1, 1, 1), timestep.expand(branches * count).float()
        down, mid = model.control(both, times, layouts)
        output = model.predict(both, times, hidden, bias, down, mid, drawn)
        if guided:
            without, with_them = output.chunk(2)
            output = without + scales * (with_them - without)
        latents = scheduler.step(output, timestep, latents).prev_sample
    give_back(model.decode(latents), made[:, TEXTURED] / 2 + 0.5, copies, 1.0, model.rest_scale)


def drafts(model: NativeModel, requests: list[Request]) -> Tensor:
    shown = [torch.cat([to_tensor(c) for c in one.contexts]) for one in requests]
    looks = model.look(torch.cat(shown))
    controls = [one.controls[0] for one in requests]
    layouts = model.layout(
        torch.cat([to_tensor(one.pixels) for one in controls]), [one.kind for one in controls]
    )
    return drafts_of(layouts, looks, np.array([len(contexts) for contexts in shown]))


def batched(items: list[Request], size: int) -> Iterable[list[Request]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def grouped(requests: list[Request], size: int) -> Iterable[list[Request]]:
    def kind(one: Request) -> tuple[bool, int]:
        return one.settings.guidance_scale > 1, one.settings.num_inference_steps

    for _, group in itertools.groupby(sorted(requests, key=kind), kind):
        yield from batched(list(group), size)


def static(model: NativeModel, requests: list[Request], size: int) -> None:
    for group in grouped(requests, size):
        batch(model, group)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(model: NativeModel, name: str, requests: list[Request], repeats: int) -> None:
    engine = Engine(
        NativeBackbone(model), torch.device("cpu"), SHAPES["native", "cpu"], threads=torch.get_num_threads()
    )
    sides: dict[str, Callable[[], object]] = {
        "engine": lambda: list(engine.run(requests)),
        "in order": lambda: [batch(model, some) for some in batched(requests, BATCH)],
    }
    if name == "mixed":
        sides |= {f"grouped by {size}": partial(static, model, requests, size) for size in SIZES}
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):  # in turns: the machine's mood is the same for all
        for side, call in sides.items():
            spent[side].append(timed(call))
    medians = {side: statistics.median(seconds) for side, seconds in spent.items()}
    for side, seconds in medians.items():
        told = (
            f"{len(requests) / seconds:.2f} pictures/s, {seconds / medians['engine']:.2f} times the "
            "engine's time"
        )
        print(f"{name}, {side}: {told}", flush=True)
    print(f"{name}: occupancy {engine.occupancy.share:.3f}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", nargs="?", default="bundled")
    arguments.add_argument("--rows", type=int, default=48)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--trace", type=Path, help="draw the lanes over time into this picture")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    model = NativeModel.from_pretrained(model_folder(given.model))
    if given.trace:
        from slots_figure import draw

        draw(model, rows(given.rows, mixed=True), given.trace)
    for name in ("uniform", "mixed"):
        compare(model, name, rows(given.rows, name == "mixed"), given.repeats)


if __name__ == "__main__":
    main()
