"""A picture of a run's losses, of what metrics.jsonl holds: one panel a stage, training and validation."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from pathlib import Path

from context_diffusion.training.state import writing

SMOOTH = 9  # values of a training curve that are averaged: single batches differ much


def draw_curves(folder: Path) -> None:
    """Leaves curves.png beside metrics.jsonl; needs matplotlib, and says so where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.getLogger(__name__).warning("no curves.png: it needs matplotlib, pip install 'context-diffusion[train]'")
        return
    panels = _panels(folder / "metrics.jsonl")
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in curves.items():
            steps, losses = zip(*sorted(points.items()), strict=True)
            dense = len(losses) > 4 * SMOOTH
            axes.plot(steps, _smooth(losses) if dense else losses, marker=None if dense else "o", label=name)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    with writing(path := folder / "curves.png"):
        figure.savefig(path, dpi=90)


def _panels(path: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Panel -> curve -> loss by step. A step that was done twice, before and after a crash, counts as the second."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if "loss" in told:
            own = told["stage"] in ("autoencoder", "decoder")
            panels["autoencoder" if own else "diffusion"][told["stage"]][told["step"]] = told["loss"]
    return panels


def _smooth(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and its neighbours, as far as there are some."""
    half = SMOOTH // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
