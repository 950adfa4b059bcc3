"""The engine on the bundled model against a loop written with diffusers on the same components, in one run.

    python tests/benchmarks/engine.py [MODEL] [--rows 48] [--repeats 5] [--threads 2] [--trace PNG]

All rows have a prompt, since a row without one needs no guidance. Uniform rows: 20 steps, guidance 1.5; the
loop runs full batches of 8. Mixed rows: 20 to 50 steps, guidance 1 and 5, one to three contexts; the loop
runs batches in the manifest's order, as long as their longest row and guided where any row is; and the best
static batching: rows of equal steps and guidance together, in the batch size that is quickest. Drafts, which
both sides make row by row, are the product's own, so both sides' images are the same; how far they differ is
printed. Medians of turns side by side. --trace draws the lanes of both sides over time."""

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
from slots_figure import draw
from torch import Tensor

from context_diffusion.core.records import Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.engine import CACHE_BYTES
from context_diffusion.engine.guidance import Branch
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.conditioning import slots_of, to_tensor, weighted_contexts
from context_diffusion.models.native.draft_image import give_back
from context_diffusion.models.native.lane_drafts import Detail, NativeDrafts
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.preconditioning import EncodedDraft
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.pipeline import ContextDiffusion

BATCH = 8
SIZES = (1, 2, 4, 8)
PROMPTS = ("blue and yellow stripes", "red dots", "ocean", "a green forest")
WITHOUT = Branch(0.0, contexts=False, prompt=False)
SHOWN = Branch(1.0, contexts=True, prompt=True)


def make_rows(count: int, mixed: bool, side: int) -> list[Request]:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        query, *contexts = rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8)
        steps, guidance = (int(rng.integers(20, 51)), float(rng.choice([1.0, 5.0]))) if mixed else (20, 1.5)
        settings = Settings(seed=number, num_inference_steps=steps, guidance_scale=guidance)
        shown = tuple(contexts[: int(rng.integers(1, 4)) if mixed else 2])
        prompt = PROMPTS[number % len(PROMPTS)]
        controls = controls_of(query, ["gray"])
        rows.append(Request(str(number), 0, query, controls, shown, prompt, None, settings))
    return rows


class Loop:
    """Batches as diffusers' pipelines run them: one number of steps, guidance for all or for none, both
    branches in one call."""

    def __init__(self, model: NativeModel) -> None:
        self.model, self.drafts = model, NativeDrafts(model)

    @torch.inference_mode()
    def run(self, batches: Iterable[list[Request]]) -> dict[str, np.ndarray]:
        """Return images by the rows' ids. What repeats over rows is encoded once a run, as in the engine."""
        cache = Cache(CACHE_BYTES)
        return {name: image for batch in batches for name, image in self._batch(batch, cache).items()}

    def _batch(self, requests: list[Request], cache: Cache) -> dict[str, np.ndarray]:
        model, count = self.model, len(requests)
        settings = [request.settings for request in requests]
        branches = [WITHOUT, SHOWN] if any(row.guidance_scale > 1 for row in settings) else [SHOWN]
        scheduler = DDIMScheduler.from_config(model.scheduler_config)
        scheduler.set_timesteps(max(row.num_inference_steps for row in settings))
        hidden, bias = self._conditions(requests, branches, cache)
        layouts = model.encode_control(
            torch.cat([to_tensor(request.controls[0].pixels) for request in requests]), ["gray"] * count
        ).repeat(len(branches), 1, 1, 1)
        draft, details = self._drafts(requests, branches, cache)
        noise = [
            torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(row.seed or 0))
            for row in settings
        ]
        latents = torch.cat(noise) * model.noise_scale
        scales = torch.tensor([max(row.guidance_scale, 1.0) for row in settings])[:, None, None, None]
        for timestep in scheduler.timesteps:
            both = latents.repeat(len(branches), 1, 1, 1)
            times = timestep.expand(len(both)).float()
            down, mid = model.control(both, times, layouts)
            output = model.predict(both, times, hidden, bias, down, mid, draft)
            if len(branches) > 1:
                without, shown = output.chunk(2)
                output = without + scales * (shown - without)
            latents = scheduler.step(output, timestep, latents).prev_sample
        images = model.decode(latents).split(1)
        finished = [give_back(image, **detail) for image, detail in zip(images, details, strict=True)]
        pixels = (torch.cat(finished) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return {request.id: image for request, image in zip(requests, pixels, strict=True)}

    def _conditions(
        self, requests: list[Request], branches: list[Branch], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """Encode contexts and prompts, and fuse them, for all rows of each branch in turn."""
        model = self.model
        slots = []
        for request in requests:
            contexts = weighted_contexts(request, model.context_slots)
            pixels = [model.context_pixels(to_tensor(context.pixels)) for context in contexts]
            tokens = model.encode_images(torch.cat(pixels)).split(1)
            slots.append(
                slots_of(list(tokens), [context.weight for context in contexts], model.context_slots)
            )
        tokens, weights = (torch.cat(parts) for parts in zip(*slots, strict=True))
        prompts = [
            (request.prompt if branch.prompt else "") or "" for branch in branches for request in requests
        ]
        encoded = [cache.get(f"text:{text}", partial(model.encode_text, [text])) for text in prompts]
        text, mask = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        shown = torch.cat([weights * branch.contexts for branch in branches])
        return model.fuse(text, mask, tokens.repeat(len(branches), 1, 1, 1), shown)

    def _drafts(
        self, requests: list[Request], branches: list[Branch], cache: Cache
    ) -> tuple[EncodedDraft, list[Detail]]:
        """Return the drafts of all lanes, and the details of each row's image, those of the last branch."""
        lanes = [
            self.drafts.of(request, branch, weighted_contexts(request, self.model.context_slots), cache)
            for branch in branches
            for request in requests
        ]
        parts = [torch.cat([lane[name] for lane, _ in lanes]) for name in ("draft", "draft_latents")]
        return EncodedDraft(*parts), [detail for _, detail in lanes[-len(requests) :]]


def batched(rows: list[Request], size: int) -> Iterable[list[Request]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def grouped(rows: list[Request], size: int) -> Iterable[list[Request]]:
    def kind(row: Request) -> tuple[bool, int]:
        return row.settings.guidance_scale > 1, row.settings.num_inference_steps

    for _, group in itertools.groupby(sorted(rows, key=kind), kind):
        yield from batched(list(group), size)


def compare(model: ContextDiffusion, loop: Loop, name: str, rows: list[Request], repeats: int) -> None:
    occupancies: list[float] = []

    def generate() -> dict[str, np.ndarray]:
        engine = model.engine()  # a new one, whose caches are empty
        outcomes = list(engine.run(rows))
        occupancies.append(engine.occupancy.share)
        return {row.id: outcome.image for row, outcome in outcomes if isinstance(outcome, Result)}

    sides: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "engine": generate,
        "in order": lambda: loop.run(batched(rows, BATCH)),
    }
    if name == "mixed":
        sides |= {f"grouped by {size}": lambda size=size: loop.run(grouped(rows, size)) for size in SIZES}
    spent: dict[str, list[float]] = {side: [] for side in sides}
    images: dict[str, dict[str, np.ndarray]] = {}
    for _ in range(repeats):  # in turns: the machine's mood is the same for all
        for side, call in sides.items():
            started = time.perf_counter()
            images[side] = call()
            spent[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(seconds) for side, seconds in spent.items()}
    for side, seconds in medians.items():
        ratio = seconds / medians["engine"]
        rate = f"{len(rows) / seconds:.2f} images/s"
        print(f"{name}, {side}: {rate}, {ratio:.2f} times the engine's time", flush=True)
    # Otherwise both sides would not do the same work. The last side runs each row's own number of steps.
    ours, theirs = images["engine"], images[side]
    largest = max(int(np.abs(ours[row.id].astype(int) - theirs[row.id]).max()) for row in rows)
    print(f"{name}: images of both sides differ by {largest} of 255 at most")
    print(f"{name}: occupancy {occupancies[-1]:.3f}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("model", nargs="?", default="bundled")
    arguments.add_argument("--rows", type=int, default=48)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--trace", type=Path, help="draw the lanes over time into this image")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model = ContextDiffusion.from_pretrained(options.model, "cpu", cpu_threads=options.threads)
    loop = Loop(NativeModel.from_pretrained(model_folder(options.model)))
    side = model.backbone.image_size
    if options.trace:
        draw(model, make_rows(options.rows, True, side), options.trace)
    for name in ("uniform", "mixed"):
        compare(model, loop, name, make_rows(options.rows, name == "mixed", side), options.repeats)


if __name__ == "__main__":
    main()
