"""Draws jobs/demo.png: some rows of the demo, each as query, contexts and output.

python tests/benchmarks/demo_page.py demo-01 demo-05 ...      reads build/demo, writes jobs/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from context_diffusion.core.job_base import Limits
from context_diffusion.inputs.decode import decode_image, resize

SIDE, GAP = 128, 6


def panel(row: dict[str, object]) -> Image.Image:
    """query, up to two contexts, output, side by side."""
    named = [str(row["query"]), *list(row["context"])[:2]]  # type: ignore[call-overload]
    sources = [str(Path("build/demo-input") / name) for name in named]
    shown = [
        Image.fromarray(resize(decode_image(Path(p).read_bytes(), Limits(), p), SIDE, SIDE, "crop"))
        for p in sources
    ]
    page = Image.new("RGB", (4 * SIDE + 5 * GAP, SIDE), "white")
    for place, picture in zip((0, 1, 2), shown, strict=False):
        page.paste(picture, (place * (SIDE + GAP), 0))
    page.paste(
        Image.open(Path("build/demo") / str(row["file_name"])).resize((SIDE, SIDE)),
        (3 * (SIDE + GAP) + 2 * GAP, 0),
    )
    return page


def main(ids: list[str]) -> None:
    table = pq.read_table("build/demo/data").to_pylist()
    rows = {row["id"]: row for row in table if row["status"] == "ok"}
    panels = [panel(rows[row]) for row in ids or sorted(rows)]
    half = (len(panels) + 1) // 2
    wide, tall = panels[0].width, SIDE + GAP
    page = Image.new("RGB", (2 * wide + 4 * GAP, half * tall - GAP), "white")
    for number, made in enumerate(panels):
        page.paste(made, ((number // half) * (wide + 4 * GAP), (number % half) * tall))
    page.save("jobs/demo.png" if ids else "build/demo.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
