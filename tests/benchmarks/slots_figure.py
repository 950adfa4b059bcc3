"""Draws jobs/slots.png: which row each lane works for at each step, in the engine and in static batches.

python tests/benchmarks/engine.py --rows 24 --repeats 1 --trace jobs/slots.png

The engine's side is a trace of a real run: after each step it is asked which rows went on. The other side is
what batches in the manifest's order take: every row of a batch for as long as its longest, guided where one
is."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from context_diffusion.core.records import Request
from context_diffusion.pipeline import ContextDiffusion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EMPTY = -1


def draw(model: ContextDiffusion, requests: list[Request], path: Path) -> None:
    engine = model.engine()
    lanes_of = {request.id: len(model.backbone.branches(request)) for request in requests}
    lanes = engine.most_chunks * engine.sizes.table[0]
    advanced: list[str] = []
    engine.callback = lambda update: advanced.append(update.request.id)
    for request in requests:
        engine.add(request)
    columns: list[tuple[list[str], int]] = []
    while not engine.idle:
        paid = engine.occupancy.paid
        engine.step()
        if advanced:
            ids = [name for name in advanced for _ in range(lanes_of[name])]
            columns.append((ids, engine.occupancy.paid - paid))
            advanced.clear()
    grids = {"engine": _grid(columns, lanes), "static batches": _grid(_static(requests, lanes // 2), lanes)}
    figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        full = (grid > EMPTY).sum() / (grid >= EMPTY).sum()
        axis.imshow(
            np.ma.masked_less(grid, EMPTY + 0.5),
            aspect="auto",
            interpolation="nearest",
            cmap="tab20",
            extent=(0, grid.shape[1], 0, grid.shape[0]),
        )
        axis.set_title(
            f"{name}: {grid.shape[1]} steps, {full:.0%} of the lanes that they pay for used",
            fontsize=9,
            loc="left",
        )
        axis.set_yticks([])
        axis.set_xlim(0, max(grid.shape[1] for grid in grids.values()))
    axes[1].set_xlabel("steps; a colour each row of the manifest, white: lanes that do nothing", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def _grid(columns: list[tuple[list[str], int]], lanes: int) -> np.ndarray:
    """Return a column of lanes for each step, given the row of each lane ("" for none) and how many lanes are
    paid for: the row's colour, EMPTY where a lane is unused, below it where none is paid for."""
    grid = np.full((lanes, len(columns)), EMPTY - 1)
    for number, (ids, paid) in enumerate(columns):
        grid[:paid, number] = EMPTY
        grid[: len(ids), number] = [int(name) % 20 if name else EMPTY for name in ids]
    return grid


def _static(requests: list[Request], size: int) -> list[tuple[list[str], int]]:
    columns = []
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        guided = any(request.settings.guidance_scale > 1 for request in batch)
        for step in range(max(request.settings.num_inference_steps for request in batch)):
            lanes: list[str] = []
            for request in batch:
                name = request.id if step < request.settings.num_inference_steps else ""
                lanes += [name, name if request.settings.guidance_scale > 1 else ""] if guided else [name]
            columns.append((lanes, len(lanes)))
    return columns
