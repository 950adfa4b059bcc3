"""The engine on a narrow FLUX.2 [klein] of random weights against diffusers' pipeline row by row, on a CPU.

    python tests/benchmarks/engine_flux2.py [--rows 16] [--repeats 3] [--threads 1 2] [--chunk LANES]

Each row has references of its own, 2 to 6 steps and an output of 256 px; diffusers' pipeline takes one set of
references for a batch. The model is so wide (2 double and 4 single blocks of 256) that most of the time is
arithmetic. Medians of turns side by side, and how far the images of both sides differ."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flux2_loop import Flux2Loop
from gpu_rows import klein_rows
from random_flux2 import NARROW, write_flux2

from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.pipeline import ContextDiffusion

SIDE = 256  # of an output, in pixels
STEPS = 3  # rows have 2 to twice as many
CPU = torch.device("cpu")


def by_engine(
    model: ContextDiffusion, rows: list[Request], chunk: int | None, occupancies: list[float]
) -> dict[str, Pixels]:
    """Generate rows with a new engine, whose caches are empty, and append its occupancy."""
    engine = model.engine(chunk)
    outcomes = list(engine.run(rows))
    occupancies.append(engine.occupancy.share)
    return {row.id: outcome.image for row, outcome in outcomes if isinstance(outcome, Result)}


def by_diffusers(loop: Flux2Loop, rows: list[Request], threads: int) -> dict[str, Pixels]:
    """Generate rows one by one, with so many of torch's threads."""
    torch.set_num_threads(threads)
    return {row.id: loop.run([row])[0].numpy() for row in rows}


def compare(folder: Path, rows: int, repeats: int, threads: int, chunk: int | None) -> None:
    parts = write_flux2(folder, NARROW, CPU, torch.float32)
    model = ContextDiffusion.from_pretrained(parts, "cpu", cpu_threads=threads)
    loop = Flux2Loop(parts, CPU)
    requests = klein_rows(model, "mixed steps and references", rows, STEPS, SIDE)
    occupancies: list[float] = []
    sides: dict[str, Callable[[], dict[str, Pixels]]] = {
        "engine": lambda: by_engine(model, requests, chunk, occupancies),
        "diffusers": lambda: by_diffusers(loop, requests, threads),
    }
    spent: dict[str, list[float]] = {side: [] for side in sides}
    worked: dict[str, list[float]] = {side: [] for side in sides}
    images: dict[str, dict[str, Pixels]] = {}
    for _ in range(repeats):  # in turns: other work on the machine slows both
        for side, call in sides.items():
            began = time.perf_counter()
            began_working = time.process_time()
            images[side] = call()
            spent[side].append(time.perf_counter() - began)
            worked[side].append(time.process_time() - began_working)
    for side, seconds in spent.items():
        turns = ", ".join(f"{turn:.1f}" for turn in seconds)
        rate = f"{rows / statistics.median(seconds):.3f} images/s"
        print(f"{threads} thread(s), {side}: {rate} (turns of {turns} s)")
    apart = [
        int(np.abs(image.astype(int) - images["engine"][row]).max())
        for row, image in images["diffusers"].items()
    ]
    print(
        f"{threads} thread(s): the engine's speed to diffusers' {ratios_of(spent)}, by CPU time "
        f"{ratios_of(worked)}; occupancy {occupancies[-1]:.3f}, images differ by {max(apart)} of 255 at most",
        flush=True,
    )


def ratios_of(seconds: dict[str, list[float]]) -> str:
    """Return the median of the turns' ratios, and the least and the largest."""
    ratios = [theirs / ours for ours, theirs in zip(seconds["engine"], seconds["diffusers"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rows", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--chunk", type=int, help="lanes; default: the product's")
    options = arguments.parse_args()
    for threads in options.threads:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options.rows, options.repeats, threads, options.chunk)


if __name__ == "__main__":
    main()
