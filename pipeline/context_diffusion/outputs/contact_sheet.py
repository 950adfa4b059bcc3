"""Contact sheets: images side by side, each with a caption. Knows no files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from context_diffusion.core.records import Pixels

SIDE, GAP, TEXT = 192, 8, 12  # pixels: an image's longer side, the gap between images, a letter's height
LINES = 4  # of a caption, at most
FONT = ImageFont.load_default(TEXT)
LETTERS = int(SIDE / FONT.getlength("n"))  # of a line

Cell = tuple[str, Pixels]  # caption, image (H, W, 3)


def contact_sheet(rows: Sequence[Sequence[Cell]]) -> Pixels:
    """Draw rows of images, each in a square of SIDE with its caption below; return uint8 (H, W, 3) on
    white."""
    captions = [[_lines(caption) for caption, _ in row] for row in rows]
    heights = [SIDE + GAP + (TEXT + 4) * max(map(len, row), default=0) + GAP for row in captions]
    width = GAP + (SIDE + GAP) * max(map(len, rows))
    sheet = Image.new("RGB", (width, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, lines, height in zip(rows, captions, heights, strict=True):
        for number, (_, pixels) in enumerate(row):
            left = GAP + number * (SIDE + GAP)
            image = _scaled(pixels)
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
            draw.multiline_text((left, top + SIDE + GAP // 2), "\n".join(lines[number]), "black", FONT, spacing=4)
        top += height
    return np.asarray(sheet)


def _lines(caption: str) -> list[str]:
    """Wrap a caption into lines; one that is too long ends in three dots. Letters that the font lacks become
    boxes."""
    return textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder=" ...")


def _scaled(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)
