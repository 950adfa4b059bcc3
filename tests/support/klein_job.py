"""A job of FLUX.2 [klein] over files of any size and format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from context_diffusion.core.generate_job import GenerateJob
from support.tiny_flux2 import tiny_images

# By number, as `write_job` names them.
FILES = (
    ("0.png", (100, 70)),
    ("1.jpg", (64, 128)),
    ("2.png", (300, 200)),
    ("3.jpg", (97, 81)),
    ("4.webp", (80, 80)),
    ("5.png", (64, 64)),
    ("small.png", (100, 63)),
    ("long.jpg", (1032, 128)),
    ("panorama.png", (512, 64)),
)


def write_job(folder: Path, model: Any, lines: list[dict[str, Any]], **keys: Any) -> GenerateJob:
    """Write FILES and a manifest of rows, and return its job. keys: further ones of the job."""
    for number, (name, size) in enumerate(FILES):
        tiny_images(1, [size], seed=number)[0].save(folder / name)
    rows = [{"id": f"row-{number}", **line} for number, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"kind": "generate", "manifest": str(folder / "rows.jsonl"), "output": str(folder / "out")}
    return GenerateJob.model_validate(values | {"model": model, **keys})
