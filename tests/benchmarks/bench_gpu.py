"""The engine on a GPU against diffusers' own pipelines, random weights in the true shapes.

    python tests/benchmarks/bench_gpu.py [--model flux2-klein --model sd15 --model sdxl] [--rows 48]
    [--batches 1 2 4 8 16] [--device cuda] [--tiny] [--no-compile]

Both sides load the same files, in bf16: FLUX.2 [klein] 4B, and Stable Diffusion with a ControlNet and
IP-Adapter Plus, channels last. For each model:

- the card's own rate of matrix products in this run;
- the engine as users run it, by the product's loader, eager with its CUDA graphs and then with `compile:
  auto`: seconds of each part, images a second for each kind of rows of gpu_rows.py, with the occupancy; the
  share of the rate of matrix products by the FLOPs of flops.py; how many rows are equal to the bit when the
  last comes first; peak memory;
- diffusers_loop.py or flux2_loop.py, eager and then compiled, at the best size of batches (found eager, on
  rows that it can batch), on the same rows in the same order; how far its images are from the engine's; and
  the ratios. diffusers' FLUX.2 takes one set of references for a batch: rows that share theirs run in
  batches, all others one by one.

--tiny: the same on small components, where there is no GPU."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers_loop import DiffusersLoop
from flux2_loop import Flux2Loop
from gpu_device import Device
from gpu_models import NAMES, Case, case_of

from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.step import Stepper
from context_diffusion.models.compilation import Compile
from context_diffusion.pipeline import ContextDiffusion

VARIANTS: dict[Compile, str] = {"off": "eager", "auto": "compiled"}
# Of each form of a batch: the first one loads kernels or compiles, the second one records CUDA graphs.
WARM_UPS: dict[Compile, int] = {"off": 1, "auto": 2}
FEW_ROWS = 4  # for the seconds of parts; twice as many for equal bits


@dataclass(frozen=True)
class Side:
    """What one side did. rates: images a second, by kind of rows. images: of the uniform rows."""

    rates: dict[str, float]
    images: list[Pixels]


@dataclass(frozen=True)
class Bench:
    """What is measured, on which device. batches: sizes of diffusers' batches."""

    case: Case
    device: Device
    rows: int
    batches: list[int]
    compile: bool

    @property
    def variants(self) -> list[Compile]:
        """Return the values of `compile` that are measured. Nothing is compiled on a CPU."""
        return ["off", "auto"] if self.compile and self.device.is_gpu else ["off"]


def images_of(engine: Engine, requests: Sequence[Request], runs: list[dict[str, Pixels]]) -> None:
    """Generate rows, and append their images by id to `runs`. Raises RuntimeError for a row that fails:
    nothing is measured then."""
    images = {}
    for request, outcome in engine.run(requests):
        if not isinstance(outcome, Result):
            raise RuntimeError(f"row {request.id}: {outcome.code}: {outcome.message}")
        images[request.id] = outcome.image
    runs.append(images)


def measure(bench: Bench) -> None:
    device, case = bench.device, bench.case
    rate = device.matrix_rate()
    print(f"{case.name}: matrix products {rate / 1e12:.2f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Any] = {}
        written = device.seconds(lambda: parts.update(case.write(Path(folder), device.device, device.dtype)))
        print(f"  random weights written in {written:.1f} s", flush=True)
        best = None
        for key in bench.variants:
            ours, requests = by_engine(bench, parts, key, rate)
            theirs, best = by_diffusers(bench, parts, key, requests, best)
            report(bench.case, key, ours, theirs)


def report(case: Case, key: Compile, ours: Side, theirs: Side) -> None:
    difference = np.abs(np.stack(ours.images).astype(int) - np.stack(theirs.images))
    print(
        f"  {VARIANTS[key]}, images of both sides differ by {difference.mean():.3f} of 255 in the mean, "
        f"{difference.max()} at most"
    )
    ratios = ", ".join(f"{kind} {ours.rates[kind] / theirs.rates[kind]:.2f}" for kind in case.kinds)
    our_kind, their_kind, what = case.across
    across = ours.rates[our_kind] / theirs.rates[their_kind]
    print(
        f"  engine to diffusers, both {VARIANTS[key]}: {ratios}, {what} {across:.2f}",
        flush=True,
    )


def by_engine(
    bench: Bench, parts: dict[str, Any], key: Compile, rate: float
) -> tuple[Side, dict[str, list[Request]]]:
    """Measure the engine, and return the rows too, by their kind."""
    device, case = bench.device, bench.case
    device.free_memory()
    models: list[ContextDiffusion] = []
    load = partial(ContextDiffusion.from_pretrained, parts, str(device.device), cpu_threads=1, compile=key)
    loading = device.seconds(lambda: models.append(load()))
    [model] = models
    name = f"engine, {VARIANTS[key]}"
    few = max(model.chunks[0], FEW_ROWS)
    spent = parts_of_time(device, model.engine(), case.rows(model, "uniform", few, case.steps))
    print(f"  {name}: load {loading:.1f} s, {spent}", flush=True)
    requests = {kind: case.rows(model, kind, bench.rows, case.steps) for kind in case.kinds}
    rates: dict[str, float] = {}
    images: list[dict[str, Pixels]] = []
    for kind, rows in requests.items():
        warm_up(model, rows)
        engine = model.engine()
        generate = partial(images_of, engine, rows, images)
        rates[kind] = len(rows) / device.seconds(generate)
        occupancy = f"occupancy {engine.occupancy.share:.3f}"
        print(f"  {name}, {kind}: {rates[kind]:.3f} images/s, {occupancy}", flush=True)
    if not device.tiny:
        share = case.flops() * rates["uniform"] / rate
        print(f"  {name}, uniform: {share:.3f} of the matrix products' rate")
    mixed = case.rows(model, case.mixed, 2 * few, min(3, case.steps))
    equal = equal_in_another_order(model, mixed)
    print(f"  {name}, rows in another order, equal to the bit: {equal} of {len(mixed)}")
    print(f"  {name}, peak memory {device.peak_memory():.2f} GiB", flush=True)
    return Side(rates, [images[0][row.id] for row in requests["uniform"]]), requests


def warm_up(model: ContextDiffusion, rows: list[Request]) -> None:
    """Generate a row of each shape in two steps: the first call loads kernels, or compiles."""
    by_shape = {model.backbone.shape_group(row): row for row in rows}
    settings = {"num_inference_steps": 2}
    short = [replace(row, settings=row.settings.model_copy(update=settings)) for row in by_shape.values()]
    images_of(model.engine(), short, [])


def equal_in_another_order(model: ContextDiffusion, rows: list[Request]) -> int:
    """Return how many rows are equal to the bit when the last comes first."""
    orders: list[dict[str, Pixels]] = []
    for order in (rows, rows[::-1]):
        images_of(model.engine(), order, orders)
    forward, backward = orders
    return sum(np.array_equal(forward[row], backward[row]) for row in forward)


def parts_of_time(device: Device, engine: Engine, rows: list[Request]) -> str:
    """Say where the time of rows goes, in a run that waits for the device after each part. The first step
    compiles, and captures a CUDA graph; what it takes longer than others is given apart."""
    spent: dict[str, list[float]] = {"encode": [], "step": [], "decode": []}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            results: list[Any] = []
            spent[part].append(device.seconds(lambda: results.append(call(*arguments, **options))))
            return results[0]

        return wrapped

    backbone: Any = engine.backbone
    with (
        patch.object(backbone, "encode", timed("encode", backbone.encode)),
        patch.object(backbone, "decode", timed("decode", backbone.decode)),
        patch.object(Stepper, "__call__", _method(timed("step", Stepper.__call__))),
    ):
        total = device.seconds(partial(images_of, engine, rows, []))
    step = median(spent["step"])
    first = "slowest step's surplus (compile, capture)"
    return (
        f"{len(rows)} rows in {total:.2f} s: {first} {max(spent['step']) - step:.2f} s, "
        f"encode {sum(spent['encode']):.2f} s, {len(spent['step'])} steps "
        f"{step * len(spent['step']):.2f} s ({1000 * step:.1f} ms each), decode {sum(spent['decode']):.2f} s"
    )


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that a class binds to its objects."""
    return lambda self, *arguments, **options: call(self, *arguments, **options)


def by_diffusers(
    bench: Bench, parts: dict[str, Any], key: Compile, requests: dict[str, list[Request]], best: int | None
) -> tuple[Side, int]:
    """Measure diffusers, and return the size of its batches too. best: the size, if it is known."""
    device, case = bench.device, bench.case
    device.free_memory()
    loop = case.loop(parts, device.device)
    best = best or best_size(bench, loop, requests[case.batched])
    if key == "auto":
        loop.compile()
    name = f"diffusers, {VARIANTS[key]}"
    rates = {}
    images: dict[str, Pixels] = {}
    for kind, rows in requests.items():
        split = list(loop.batches(rows, best))
        for batch in {loop.form(batch): batch for batch in split}.values():
            for _ in range(WARM_UPS[key]):
                loop.run(batch, steps=2)
        generate = partial(run_batches, loop, split, images if kind == "uniform" else {})
        rates[kind] = len(rows) / device.seconds(generate)
        largest = max(map(len, split))
        print(f"  {name}, {kind}, batches of {largest}: {rates[kind]:.3f} images/s", flush=True)
    print(f"  {name}, peak memory {device.peak_memory():.2f} GiB", flush=True)
    return Side(rates, [images[row.id] for row in requests["uniform"]]), best


def run_batches(
    loop: DiffusersLoop | Flux2Loop, split: Sequence[list[Request]], images: dict[str, Pixels]
) -> None:
    """Generate rows batch by batch, and add their images by id."""
    for batch in split:
        images |= dict(zip([row.id for row in batch], loop.run(batch).numpy(), strict=True))


def best_size(bench: Bench, loop: DiffusersLoop | Flux2Loop, rows: list[Request]) -> int:
    """Return the quickest size of batches. Sizes that do not fit into memory, or need more rows, are left
    out."""
    rates: dict[int, float] = {}
    for size in bench.batches:
        with contextlib.suppress(torch.OutOfMemoryError):
            if size <= len(rows):
                loop.run(rows[:size], steps=2)
                rates[size] = size / bench.device.seconds(partial(loop.run, rows[:size]))
                print(f"  diffusers, eager, batches of {size}: {rates[size]:.3f} images/s", flush=True)
    return max(rates, key=lambda size: rates[size])


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", action="append", choices=NAMES)
    arguments.add_argument("--rows", type=int, default=48)
    arguments.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes of diffusers' batches"
    )
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--tiny", action="store_true")
    arguments.add_argument("--no-compile", action="store_true")
    options = arguments.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        print("no GPU here: --tiny shows that it runs")
        return
    for name in options.model or NAMES:
        case = case_of(name, options.tiny)
        measure(
            Bench(case, Device(device, options.tiny), options.rows, options.batches, not options.no_compile)
        )


if __name__ == "__main__":
    main()
