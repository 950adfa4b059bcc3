"""CPU time of each score per image, against the CPU time of a row of the bundled model.

python tests/benchmarks/scoring.py [--pictures 8] [--contexts 2] [--steps 20]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import COLUMNS_BY_SCORE
from context_diffusion.evaluation.scores import measure
from context_diffusion.pipeline import ContextDiffusion
from support.held_out import held_out_rows

SHARE = 0.05  # of a row's time that scoring may take


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Of all threads of this process: wall time says little where others use the machine too."""
    started = time.process_time()
    work()
    return time.process_time() - started


def large(pixels: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def of_row(pictures: int, steps: int) -> float:
    """CPU seconds of a row: the bundled model, 128 px, guidance 1.5, made together."""
    model = ContextDiffusion.from_pretrained(device="cpu", cpu_threads=1)
    settings = {"num_inference_steps": steps}
    rows = [
        model.requests(
            row.query, [Image.fromarray(one) for one in row.contexts], "ocean", None, "gray", "crop", settings
        )[0]
        for row in held_out_rows()[:pictures]
    ]
    list(model.generate(rows[:1]))  # warm
    return cpu_seconds(lambda: list(model.generate(rows))) / pictures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--contexts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    told = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count too
    row = of_row(told.pictures, told.steps)
    print(f"a row: {row * 1e3:.0f} ms of CPU, {told.steps} steps at 128 px", flush=True)
    rows = held_out_rows()
    shown = [
        [rows[(n + k) % 8].contexts[0] for k in range(told.contexts)] for n in range(told.pictures)
    ]  # they repeat
    costs: dict[int, dict[str, float]] = {}
    for side in (128, 512):
        pictures = [(large(row.truth, side), large(row.query, side)) for row in rows[: told.pictures]]
        contexts = [[large(one, 128 if side == 128 else 224) for one in of] for of in shown]

        def score(columns: tuple[str, ...], pictures: Any = pictures, contexts: Any = contexts) -> None:
            for (image, query), given in zip(pictures, contexts, strict=True):
                for column in columns:
                    measure(column, image, query, given, "ocean colours with wavy texture")

        costs[side] = {}
        for name, columns in COLUMNS_BY_SCORE.items():
            # Warm, by other pictures: contexts repeat over a job's rows, and what is found in them is kept;
            # pictures do not.
            score(columns, [(query, image) for image, query in pictures])
            costs[side][name] = cpu_seconds(lambda c=columns: score(c)) / told.pictures  # type: ignore[misc]
    for side, by_score in costs.items():
        for name, seconds in by_score.items():
            share = f", {seconds / row:.1%} of the row" if side == 128 else ""
            print(f"{side} px, {told.contexts} contexts: {name} {seconds * 1e3:.1f} ms{share}")
    total = sum(costs[128].values()) / row
    print(f"all at 128 px: {total:.1%} of the row, {'below' if total < SHARE else 'ABOVE'} {SHARE:.0%}")


if __name__ == "__main__":
    main()
