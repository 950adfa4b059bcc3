"""Writes the demo's input: photographs from scikit-image, drawn layouts and styles, and a manifest.

python jobs/demo_input.py build/demo-input
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import PALETTES, TEXTURES, Style, dress, make_lut

# Those that lie in the package itself; skimage.data's others would be downloaded.
PHOTOGRAPHS = [
    "astronaut", "coffee", "chelsea", "rocket", "camera", "retina", "coins", "horse",
    "immunohistochemistry", "brick", "grass",
]  # fmt: skip
QUERIES = [
    "astronaut", "coffee", "chelsea", "rocket", "camera", "retina", "coins", "camera", "horse",
    "immunohistochemistry", "brick",
    "coffee", "grass", "astronaut",
]  # fmt: skip
# Every other of those is dressed in another photograph: pairs that show something at 128 pixels.
WORN = ["retina", "coffee", "immunohistochemistry", "chelsea", "astronaut", "chelsea", "camera"]
PROMPTS = [
    "autumn colours",
    "ocean colours",
    "dots",
    "a forest picture of hills",
    "violet tones and wavy texture",
    "striped",
]


def write_photographs(folder: Path) -> list[str]:
    names = []
    for name in PHOTOGRAPHS:
        try:
            pixels = getattr(skimage.data, name)()
        except Exception as error:  # another release of scikit-image may ship fewer
            print(f"scikit-image has no {name} here: {error}", file=sys.stderr)
            continue
        Image.fromarray(pixels if pixels.dtype == np.uint8 else (pixels * 255).astype(np.uint8)).convert(
            "RGB"
        ).save(folder / f"{name}.jpg", quality=92)
        names.append(f"{name}.jpg")
    return names


def write_drawn(folder: Path, rng: np.random.Generator) -> tuple[list[str], list[list[str]]]:
    """Drawn layouts in grey, and for each named palette three pictures in one style."""
    grey = Style(
        "mono",
        "flat",
        np.repeat(np.linspace(0.05, 0.95, 256, dtype=np.float32)[:, None], 3, 1),
        9,
        0,
        0,
        "all",
        0,
        (0, 0),
        0,
    )
    layouts, styles = [], []
    for number in range(10):
        name = f"layout-{number}.png"
        Image.fromarray(dress(make_layout(rng, 256)[1], grey, rng)).save(folder / name)
        layouts.append(name)
    for number, palette in enumerate(sorted(PALETTES)):
        texture = TEXTURES[number % len(TEXTURES)]
        style = Style(palette, texture, make_lut(rng, palette), 18, 0.6 * number, 0.14, "all", 0, (0, 0), 0)
        names = [f"style-{palette}-{picture}.png" for picture in range(3)]
        for name in names:
            Image.fromarray(dress(make_layout(rng, 256)[1], style, rng)).save(folder / name)
        styles.append(names)
    return layouts, styles


def main(target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2026)
    photographs = write_photographs(folder)
    layouts, styles = write_drawn(folder, rng)

    def photograph(wanted: str, number: int) -> str:
        return name if (name := f"{wanted}.jpg") in photographs else photographs[number % len(photographs)]

    rows = []
    for number in range(28):
        query = (
            photograph(QUERIES[number // 2], number)
            if number % 2 == 0
            else layouts[number // 2 % len(layouts)]
        )
        contexts = styles[number % len(styles)][: 1 + number % 3]
        if number % 4 == 2:  # a photograph dressed in another one
            contexts = [photograph(WORN[number // 4], number)]
        rows.append(
            {
                "id": f"demo-{number:02d}",
                "query": query,
                "context": contexts,
                "prompt": PROMPTS[number % len(PROMPTS)] if number % 3 == 1 else None,
                "num_inference_steps": [12, 16, 20, 30][number % 4],
                "guidance_scale": [1.0, 1.5, 2.0][number % 3],
                "scheduler": ["ddim", "euler"][number % 2],
                "seed": 100 + number if number % 5 else None,
            }
        )
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("query", pa.string()),
            ("context", pa.list_(pa.string())),
            ("prompt", pa.string()),
            ("num_inference_steps", pa.int32()),
            ("guidance_scale", pa.float64()),
            ("scheduler", pa.string()),
            ("seed", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "manifest.parquet")
    print(f"{len(rows)} rows in {folder / 'manifest.parquet'}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
