"""Pictures of one's own, as files: two styles of generated layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from context_diffusion.core.training_job import FinetuneJob
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import dress, make_style
from support.tiny import tiny_model

FORMATS = ("png", "jpg", "webp", "bmp")


def write_styles(folder: Path, styles: int = 2, pictures: int = 4) -> Path:
    """folder/style-S/picture-P.FORMAT, in several formats and sizes."""
    rng = np.random.default_rng(5)
    for number in range(styles):
        style, inside = make_style(rng), folder / f"style-{number}"
        inside.mkdir(parents=True)
        for k in range(pictures):
            made = Image.fromarray(dress(make_layout(rng, 80 + 8 * k)[1], style, rng))
            made.save(inside / f"picture-{k}.{FORMATS[k % len(FORMATS)]}")
    return folder


def write_base(folder: Path) -> str:
    """The tiny model as a folder."""
    tiny_model().save_pretrained(folder)
    return str(folder)


def job(data: object, output: Path, model: str = "bundled", **more: Any) -> FinetuneJob:
    values: dict[str, Any] = {
        "cpu_threads": 1,
        "styles": 4,
        "pictures": 4,
        "pool_steps": 2,
        "checkpoint_every": 2,
        "max_steps": 4,
    }
    diffusion = {"batch_size": 4} | more.pop("diffusion", {})
    chosen = (
        values
        | {
            "kind": "finetune",
            "data": str(data),
            "output": str(output),
            "model": model,
            "diffusion": diffusion,
        }
        | more
    )
    return FinetuneJob.model_validate(chosen)
