"""An image of held-out rows, each with its query, control map, contexts, target and output; and the curves of
losses."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from context_diffusion.core.records import Request, Result
from context_diffusion.engine.engine import Engine
from context_diffusion.inputs.decode import resize
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.loop.checkpoints import writing


def make(model: NativeModel, requests: list[Request]) -> list[NDArray[np.uint8]]:
    """Generate the requests' images, in their order; contexts may have any size."""
    side = model.context_size
    images: dict[str, NDArray[np.uint8]] = {}
    requests = [
        replace(request, contexts=tuple(resize(context, side, side, "crop") for context in request.contexts))
        for request in requests
    ]
    for request, outcome in Engine(NativeBackbone(model), model.device, (4,)).run(requests):
        assert isinstance(outcome, Result), outcome
        images[request.id] = outcome.image
    return [images[request.id] for request in requests]


def save_samples(
    model: NativeModel, requests: list[Request], targets: list[NDArray[np.uint8]], path: Path
) -> None:
    blank = np.full_like(targets[0], 128)
    rows = []
    for request, image, target in zip(requests, make(model, requests), targets, strict=True):
        contexts = [*request.contexts, blank, blank][:3]
        rows.append(np.concatenate([request.query, request.controls[0].given, *contexts, target, image], 1))
    half = len(rows) // 2
    page = Image.fromarray(np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], 1))
    with writing(path):
        page.save(path)


SMOOTH = 9  # values of a training curve that are averaged: single batches differ much


def draw_curves(folder: Path) -> None:
    """Write curves.png beside metrics.jsonl; warn if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.getLogger(__name__).warning(
            "no curves.png: it needs matplotlib, pip install 'context-diffusion[train]'"
        )
        return
    panels = _panels(folder / "metrics.jsonl")
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
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
    """Return the losses by panel, curve and step; of a step that ran twice, before and after a crash, the
    second."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        if "loss" in metrics:
            panel = "autoencoder" if metrics["stage"] in ("autoencoder", "decoder") else "diffusion"
            panels[panel][metrics["stage"]][metrics["step"]] = metrics["loss"]
    return panels


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the mean of each value and its existing neighbours."""
    half = SMOOTH // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
