"""The engine on a GPU against diffusers' own pipelines, random weights in the true shapes.

    python tests/benchmarks/bench_gpu.py [--model sd15 --model sdxl] [--rows 48] [--batches 1 2 4 8 16]
    [--device cuda] [--tiny] [--no-compile]

Both sides load the same files by the product's loader: Stable Diffusion with a ControlNet and IP-Adapter
Plus, in bf16 and channels last. For each model:

- the card's own rate of matrix products in this run;
- the engine as users run it, eager with its CUDA graphs and then with `compile: auto`: seconds of each part,
  images a second for uniform guided rows, unguided rows, mixed steps and guidance, and mixed sizes, with the
  occupancy; the share of the rate of matrix products by the FLOPs of flops.py; how many rows are equal to the
  bit when the last comes first; peak memory;
- the loop of diffusers_loop.py, eager and then compiled as a whole with CUDA graphs, at its best batch size
  (found eager, on the uniform rows), on the same rows in the same order; how far its images are from the
  engine's; and the ratios.

--tiny: the same on small components, where there is no GPU."""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers_loop import DiffusersLoop, batches
from flops import costs, row_cost
from gpu_rows import CONTEXTS, KINDS, make_rows
from random_models import write_model

from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.step import Stepper
from context_diffusion.models.compilation import Compile
from context_diffusion.pipeline import ContextDiffusion

STEPS = {"sd15": 20, "sdxl": 30}
VARIANTS: dict[Compile, str] = {"off": "eager", "auto": "compiled"}
# Of each form of a batch: the first one loads kernels or compiles, the second one records CUDA graphs.
WARM_UPS: dict[Compile, int] = {"off": 1, "auto": 2}


@dataclass(frozen=True)
class Side:
    """What one side did. rates: images a second, by kind of rows. images: of the first uniform rows."""

    rates: dict[str, float]
    images: list[Pixels]


@dataclass(frozen=True)
class Bench:
    """What is measured, on which device. steps: of uniform rows."""

    name: str
    device: torch.device
    rows: int
    batches: list[int]
    steps: int
    tiny: bool
    compile: bool

    @property
    def variants(self) -> list[Compile]:
        """Return the values of `compile` that are measured. Nothing is compiled on a CPU."""
        return ["off", "auto"] if self.compile and self.device.type == "cuda" else ["off"]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def matrix_rate(self) -> float:
        """Return the FLOP/s of a large matrix product."""
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))

        def products() -> None:
            for _ in range(10):
                a @ b

        products()
        return 2 * side**3 * 10 / self.seconds(products)


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
    rate = bench.matrix_rate()
    print(f"{bench.name}: matrix products {rate / 1e12:.2f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write = partial(
            write_model, Path(folder), bench.name == "sdxl", bench.device, bench.dtype, bench.tiny
        )
        parts: dict[str, Any] = {}
        written = bench.seconds(lambda: parts.update(write()))
        print(f"  random weights written in {written:.1f} s", flush=True)
        best = None
        for key in bench.variants:
            ours, requests = by_engine(bench, parts, key, rate)
            theirs, best = by_diffusers(bench, parts, key, requests, best)
            report(key, ours, theirs)


def report(key: Compile, ours: Side, theirs: Side) -> None:
    count = len(theirs.images)
    difference = np.abs(np.stack(ours.images[:count]).astype(int) - np.stack(theirs.images))
    print(
        f"  {VARIANTS[key]}, images of both sides differ by {difference.mean():.3f} of 255 in the mean, "
        f"{difference.max()} at most"
    )
    ratios = ", ".join(f"{kind} {ours.rates[kind] / theirs.rates[kind]:.2f}" for kind in KINDS)
    both = ours.rates["unguided"] / theirs.rates["uniform"]
    print(
        f"  engine to diffusers, both {VARIANTS[key]}: {ratios}, unguided rows to batches with both branches "
        f"{both:.2f}",
        flush=True,
    )


def by_engine(
    bench: Bench, parts: dict[str, Any], key: Compile, rate: float
) -> tuple[Side, dict[str, list[Request]]]:
    """Measure the engine, and return the rows too, by their kind."""
    free_memory(bench)
    models: list[ContextDiffusion] = []
    load = partial(ContextDiffusion.from_pretrained, parts, str(bench.device), cpu_threads=1, compile=key)
    loading = bench.seconds(lambda: models.append(load()))
    [model] = models
    name = f"engine, {VARIANTS[key]}"
    full = model.chunks[0]
    uniform = make_rows(model, "uniform", full, bench.steps)
    print(f"  {name}: load {loading:.1f} s, {parts_of_time(bench, model.engine(), uniform)}", flush=True)
    requests = {kind: make_rows(model, kind, bench.rows, bench.steps) for kind in KINDS}
    rates: dict[str, float] = {}
    images: list[dict[str, Pixels]] = []
    for kind, rows in requests.items():
        engine = model.engine()
        generate = partial(images_of, engine, rows, images)
        rates[kind] = len(rows) / bench.seconds(generate)
        occupancy = f"occupancy {engine.occupancy.share:.3f}"
        print(f"  {name}, {kind}: {rates[kind]:.3f} images/s, {occupancy}", flush=True)
    if not bench.tiny:
        flops = row_cost(costs(bench.name == "sdxl"), bench.steps, lanes=2, contexts=CONTEXTS)
        print(f"  {name}, uniform: {flops * rates['uniform'] / rate:.3f} of the matrix products' rate")
    mixed = make_rows(model, "mixed", 2 * full, min(3, bench.steps))
    orders: list[dict[str, Pixels]] = []
    for rows in (mixed, mixed[::-1]):
        images_of(model.engine(), rows, orders)
    forward, backward = orders
    equal = sum(np.array_equal(forward[row], backward[row]) for row in forward)
    print(f"  {name}, rows in another order, equal to the bit: {equal} of {len(mixed)}")
    print(f"  {name}, peak memory {peak_memory(bench):.2f} GiB", flush=True)
    return Side(rates, [images[0][row.id] for row in requests["uniform"]]), requests


def parts_of_time(bench: Bench, engine: Engine, rows: list[Request]) -> str:
    """Say where the time of rows goes, in a run that waits for the device after each part. The first step
    compiles, and captures a CUDA graph; what it takes longer than others is given apart."""
    spent: dict[str, list[float]] = {"encode": [], "step": [], "decode": []}

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            results: list[Any] = []
            spent[part].append(bench.seconds(lambda: results.append(call(*arguments, **options))))
            return results[0]

        return wrapped

    backbone: Any = engine.backbone
    with (
        patch.object(backbone, "encode", timed("encode", backbone.encode)),
        patch.object(backbone, "decode", timed("decode", backbone.decode)),
        patch.object(Stepper, "__call__", _method(timed("step", Stepper.__call__))),
    ):
        total = bench.seconds(partial(images_of, engine, rows, []))
    step = median(spent["step"])
    first = "compile and capture" if bench.device.type == "cuda" else "first step's surplus"
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
    """Measure the loop, and return the size of its batches too. best: the size, if it is known."""
    free_memory(bench)
    loop = DiffusersLoop(parts, bench.device)
    best = best or best_size(bench, loop, requests["uniform"])
    if key == "auto":
        loop.compile()
    name = f"diffusers, {VARIANTS[key]}"
    rates = {}
    for kind, rows in requests.items():
        split = list(batches(rows, best))
        for batch in {loop.form(batch): batch for batch in split}.values():
            for _ in range(WARM_UPS[key]):
                loop.run(batch, steps=2)
        rates[kind] = len(rows) / bench.seconds(lambda split=split: [loop.run(batch) for batch in split])
        print(f"  {name}, {kind}, batches of {best}: {rates[kind]:.3f} images/s", flush=True)
    print(f"  {name}, peak memory {peak_memory(bench):.2f} GiB", flush=True)
    return Side(rates, list(loop.run(requests["uniform"][:best]).numpy())), best


def best_size(bench: Bench, loop: DiffusersLoop, rows: list[Request]) -> int:
    """Return the quickest size of batches. Sizes that do not fit into memory, or need more rows, are left
    out."""
    rates: dict[int, float] = {}
    for size in bench.batches:
        with contextlib.suppress(torch.OutOfMemoryError):
            if size <= len(rows):
                loop.run(rows[:size], steps=2)
                rates[size] = size / bench.seconds(partial(loop.run, rows[:size]))
                print(f"  diffusers, eager, batches of {size}: {rates[size]:.3f} images/s", flush=True)
    return max(rates, key=lambda size: rates[size])


def free_memory(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)


def peak_memory(bench: Bench) -> float:
    """Return GiB: those that torch reserved on a GPU, or those of the process so far."""
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_reserved(bench.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--model", action="append", choices=STEPS)
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
    for name in options.model or STEPS:
        steps = 2 if options.tiny else STEPS[name]
        measure(
            Bench(name, device, options.rows, options.batches, steps, options.tiny, not options.no_compile)
        )


if __name__ == "__main__":
    main()
