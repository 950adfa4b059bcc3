"""The calls of one denoising step that launch a kernel on a GPU: the engine's, and those of diffusers' own
pipeline for the same rows in one batch.

    python tests/benchmarks/launches.py [--rows 16]

Guided rows with two contexts through a ControlNet and an IP-Adapter, on all layers of SD 1.5 and SDXL made
narrow, by the product's own loader. Counted on a CPU, so fused attention is one call on both sides; copies to
the device and reads on the host are counted on torch's meta device."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from context_diffusion.pipeline import ContextDiffusion
from support.launches import calls_of_a_step, launches_of_diffusers, make_whole_model, rows_of


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--rows", type=int, default=16)
    rows = rows_of(arguments.parse_args().rows)
    for name, xl in (("SDXL", True), ("SD 1.5", False)):
        with tempfile.TemporaryDirectory() as folder:
            model = make_whole_model(Path(folder), xl)
            pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
            ours, theirs = calls_of_a_step(pipeline, rows), launches_of_diffusers(model, rows, xl)
        print(f"{name}, {len(rows)} guided rows, host reads {ours.reads}")
        print(f"launches: ours {ours.launches}, diffusers {theirs}, copies {ours.copies}", flush=True)


if __name__ == "__main__":
    main()
