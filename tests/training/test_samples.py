"""The picture of the curves is made of metrics.jsonl, also where a run was resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from context_diffusion.training.loop.checkpoints import Metrics
from context_diffusion.training.samples import draw_curves


def write(folder: Path, losses: list[float]) -> np.ndarray:
    folder.mkdir()
    metrics = Metrics(folder)
    for step, loss in enumerate(losses):
        metrics.write(stage="diffusion", step=25 * step, share=0.1, loss=loss)
    metrics.write(stage="validation", step=100, loss=0.4)
    metrics.write(stage="autoencoder", step=10, psnr=24.0)  # no loss: not drawn
    draw_curves(folder)
    return np.asarray(Image.open(folder / "curves.png").convert("L"))


def test_the_curves_show_the_losses(tmp_path: Path) -> None:
    falling = [1 / (1 + step) for step in range(60)]
    picture, other = write(tmp_path / "a", falling), write(tmp_path / "b", falling[::-1])
    assert picture.std() > 10
    assert (picture != other).mean() > 0.01


def test_a_step_done_twice_counts_once(tmp_path: Path) -> None:
    losses = [1.0, 0.5, 0.25]
    once = write(tmp_path / "once", losses)
    folder = tmp_path / "twice"
    folder.mkdir()
    metrics = Metrics(folder)
    metrics.write(stage="diffusion", step=50, share=0.1, loss=9.0)  # before the crash
    for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines():
        with metrics.path.open("a") as file:
            file.write(line + "\n")
    draw_curves(folder)
    assert np.array_equal(once, np.asarray(Image.open(folder / "curves.png").convert("L")))
