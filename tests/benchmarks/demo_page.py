"""Draws jobs/demo.png: some rows of the demo, each as query, contexts and output.

    python tests/benchmarks/demo_page.py demo-00 demo-02 demo-04 demo-06 demo-05 demo-15

reads build/demo and writes jobs/demo.png; without ids it writes all rows to build/demo.png.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from context_diffusion.core.job_base import Limits
from context_diffusion.inputs.decode import decode_image, resize

INPUT, OUTPUT = Path("build/demo-input"), Path("build/demo")
SIDE, GAP, COLUMNS = 136, 6, 2  # pixels of an image and between images; panels side by side
WIDTH = 3 * SIDE + 2 * GAP  # of a panel
FONT = ImageFont.load_default(13)
LINE = 20  # pixels of a line of text


def source(name: str, side: int) -> Image.Image:
    """An input image, cropped to a square."""
    return Image.fromarray(
        resize(decode_image((INPUT / name).read_bytes(), Limits(), name), side, side, "crop")
    )


def contexts(names: list[str]) -> Image.Image:
    """One context, or up to four as quarters of a square."""
    if len(names) == 1:
        return source(names[0], SIDE)
    square, half = Image.new("RGB", (SIDE, SIDE), "white"), (SIDE - GAP // 2) // 2
    for number, name in enumerate(names[:4]):
        place = (number % 2 * (SIDE - half), number // 2 * (SIDE - half))
        square.paste(source(name, half), place)
    return square


def panel(row: dict[str, Any]) -> Image.Image:
    """Query, contexts and output side by side, each named below, with the row's prompt."""
    image = Image.new("RGB", (WIDTH, SIDE + 2 * LINE), "white")
    draw = ImageDraw.Draw(image)
    output = Image.open(OUTPUT / row["file_name"]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    count = len(row["context"])
    prompt = f"prompt: {row['prompt']}" if row["prompt"] else ""
    shown = [
        (source(row["query"], SIDE), "query"),
        (contexts(row["context"]), "context" if count == 1 else f"{count} contexts"),
        (output, "output"),
    ]
    for number, (pixels, name) in enumerate(shown):
        left = number * (SIDE + GAP)
        image.paste(pixels, (left, 0))
        draw.text((left, SIDE + 2), name, "#555", FONT)
    draw.text((0, SIDE + LINE), prompt, "black", FONT)
    return image


def main(ids: list[str]) -> None:
    table = pq.read_table(OUTPUT / "data").to_pylist()
    rows = {row["id"]: row for row in table if row["status"] == "ok"}
    panels = [panel(rows[row]) for row in ids or sorted(rows)]
    width, height = WIDTH + 4 * GAP, panels[0].height + GAP
    lines = math.ceil(len(panels) / COLUMNS)
    page = Image.new("RGB", (COLUMNS * width - 4 * GAP, lines * height - GAP), "white")
    for number, image in enumerate(panels):
        page.paste(image, (number % COLUMNS * width, number // COLUMNS * height))
    page.save("jobs/demo.png" if ids else "build/demo.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
