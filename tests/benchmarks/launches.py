"""The calls of one denoising step that launch a kernel on a GPU: the engine's, and those of diffusers' own
pipeline for the same rows in one batch.

    python tests/benchmarks/launches.py [--rows 16]

Guided rows with two contexts through a ControlNet and an IP-Adapter, on all layers of SD 1.5 and SDXL made
narrow, and rows with two contexts on those of FLUX.2 [klein] 4B, by the product's own loader. diffusers takes
contexts for the whole batch: those of the first row. Counted on a CPU, so fused attention is one call on both
sides; copies to the device and reads on the host are counted on torch's meta device."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_diffusion.pipeline import ContextDiffusion
from support.launches import (
    Calls,
    calls_of_a_step,
    klein_rows,
    launches_of_diffusers,
    launches_of_diffusers_klein,
    make_whole_klein,
    make_whole_model,
    rows_of,
)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rows", type=int, default=16)
    count = arguments.parse_args().rows
    for name, distilled in (("FLUX.2 [klein] base", False), ("FLUX.2 [klein]", True)):
        with tempfile.TemporaryDirectory() as folder:
            tell(f"{name}, {count} rows", *of_klein(Path(folder), distilled, count))
    for name, xl in (("SDXL", True), ("SD 1.5", False)):
        with tempfile.TemporaryDirectory() as folder:
            tell(f"{name}, {count} guided rows", *of_stable_diffusion(Path(folder), xl, count))


def of_klein(folder: Path, distilled: bool, count: int) -> tuple[Calls, int]:
    """Return the calls of a step of ours, and the launches of one of diffusers."""
    model = make_whole_klein(folder, distilled)
    pipeline = ContextDiffusion.from_pretrained(str(model), device="cpu", cpu_threads=1)
    rows = klein_rows(pipeline, count)
    return calls_of_a_step(pipeline, rows), launches_of_diffusers_klein(model, rows)


def of_stable_diffusion(folder: Path, xl: bool, count: int) -> tuple[Calls, int]:
    model = make_whole_model(folder, xl)
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    rows = rows_of(count)
    return calls_of_a_step(pipeline, rows), launches_of_diffusers(model, rows, xl)


def tell(what: str, ours: Calls, theirs: int) -> None:
    print(f"{what}, host reads {ours.reads}")
    print(f"launches: ours {ours.launches}, diffusers {theirs}, copies {ours.copies}", flush=True)


if __name__ == "__main__":
    main()
