"""Draws images side by side on one sheet, each with a caption. Reads and writes no files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from context_diffusion.core.records import Pixels

SIDE = 192  # pixels of an image's longer side
GAP = 8  # pixels between images
FONT_SIZE = 12  # pixels
CAPTION_LINES = 4  # at most
FONT = ImageFont.load_default(FONT_SIZE)
LINE_CHARACTERS = int(SIDE / FONT.getlength("n"))

Cell = tuple[str, Pixels]  # caption, image (H, W, 3)


def contact_sheet(rows: Sequence[Sequence[Cell]]) -> Pixels:
    """Draw rows of images on white, each in a square of SIDE pixels above its caption. -> uint8 (H, W, 3)"""
    captions = [[_caption_lines(caption) for caption, _ in row] for row in rows]
    heights = [SIDE + GAP + (FONT_SIZE + 4) * max(map(len, row), default=0) + GAP for row in captions]
    width = GAP + (SIDE + GAP) * max(map(len, rows))
    sheet = Image.new("RGB", (width, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, row_captions, height in zip(rows, captions, heights, strict=True):
        for number, (_, pixels) in enumerate(row):
            left = GAP + number * (SIDE + GAP)
            image = _scaled(pixels)
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
            text = "\n".join(row_captions[number])
            draw.multiline_text((left, top + SIDE + GAP // 2), text, "black", FONT, spacing=4)
        top += height
    return np.asarray(sheet)


def _caption_lines(caption: str) -> list[str]:
    """Wrap a caption. A long one ends in three dots."""
    return textwrap.wrap(caption, LINE_CHARACTERS, max_lines=CAPTION_LINES, placeholder=" ...")


def _scaled(pixels: Pixels) -> Image.Image:
    """Resize an image so that its longer side has SIDE pixels."""
    image = Image.fromarray(pixels)
    factor = SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)
