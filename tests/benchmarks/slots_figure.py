"""Draws jobs/slots.png: which row each lane works for at each step, in the engine and in static batches.

python tests/benchmarks/engine.py --rows 24 --repeats 1 --trace jobs/slots.png

The engine's side is a trace of a real run: after each step it is asked which rows went on. The other side is
what batches in the manifest's order take: every row of a batch for as long as its longest, guided where one
is."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from context_diffusion.core.records import Request
from context_diffusion.engine.engine import Engine
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.model import NativeModel
from context_diffusion.pipeline import SHAPES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EMPTY = -1


def draw(model: NativeModel, requests: list[Request], path: Path) -> None:
    shape = SHAPES["native", "cpu"]
    lanes_of = {one.id: 1 if one.settings.guidance_scale <= 1 else 2 for one in requests}
    engine = Engine(NativeBackbone(model), torch.device("cpu"), shape)
    steps: list[list[str]] = []
    went: list[str] = []
    engine.callback = lambda progress: went.append(progress.request.id)  # type: ignore[func-returns-value]
    engine.waiting.extend(requests)
    while not engine.idle:
        engine.step()
        steps.append([name for name in went for _ in range(lanes_of[name])])
        went.clear()
    ours = _columns([step for step in steps if step], shape.lanes, shape.chunk)
    theirs = _columns(_static(requests, shape.lanes // 2), shape.lanes, shape.chunk)
    figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True)
    for axis, (what, grid) in zip(axes, (("engine", ours), ("static batches", theirs)), strict=True):
        full = (grid >= 0).sum() / (grid >= EMPTY).sum()
        shown = np.ma.masked_less(grid, EMPTY + 0.5)
        axis.imshow(
            shown,
            aspect="auto",
            interpolation="nearest",
            cmap="tab20",
            extent=(0, grid.shape[1], 0, grid.shape[0]),
        )
        axis.set_title(
            f"{what}: {grid.shape[1]} steps, {full:.0%} of the lanes that they pay for used",
            fontsize=9,
            loc="left",
        )
        axis.set_yticks([])
        axis.set_xlim(0, max(ours.shape[1], theirs.shape[1]))
    axes[1].set_xlabel("steps; a colour each row of the manifest, white: lanes that do nothing", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def _columns(steps: list[list[str]], lanes: int, chunk: int) -> np.ndarray:
    """A column of lanes for each step: the row, EMPTY where a lane is paid for and unused, below where it
    isn't paid."""
    grid = np.full((lanes, len(steps)), EMPTY - 1)
    for number, step in enumerate(steps):
        paid = -(-len(step) // chunk) * chunk
        grid[:paid, number] = EMPTY
        grid[: len(step), number] = [int(name) % 20 if name else EMPTY for name in step]
    return grid


def _static(requests: list[Request], size: int) -> list[list[str]]:
    steps = []
    for start in range(0, len(requests), size):
        group = requests[start : start + size]
        guided = any(one.settings.guidance_scale > 1 for one in group)
        for step in range(max(one.settings.num_inference_steps for one in group)):
            lanes = []
            for one in group:
                alive = one.id if step < one.settings.num_inference_steps else ""
                lanes += [alive, alive if one.settings.guidance_scale > 1 else ""] if guided else [alive]
            steps.append(lanes)
    return steps
