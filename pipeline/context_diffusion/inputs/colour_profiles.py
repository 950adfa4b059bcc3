"""Converts images by their ICC colour profile to sRGB, and removes text chunks from PNG files.

Knows Pillow and bytes only.
"""

from __future__ import annotations

import io
import zlib
from functools import lru_cache

from PIL import Image, ImageCms

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Pillow modes that a profile's colour space describes.
SPACES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L",)}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def in_srgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image by its ICC profile to sRGB.

    Images without a profile, with that of sRGB or with a broken one are returned unchanged.
    """
    data = image.info.get("icc_profile")
    if not data or "transparency" in image.info or not _needs_conversion(data, image.mode):
        return image
    try:
        target_mode = image.mode if image.mode == "RGBA" else "RGB"
        source = ImageCms.ImageCmsProfile(io.BytesIO(data))
        converted = ImageCms.profileToProfile(
            image, source, SRGB, ImageCms.Intent.RELATIVE_COLORIMETRIC, target_mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image


@lru_cache(maxsize=256)
def _needs_conversion(data: bytes, mode: str) -> bool:
    """Return whether a profile is readable, fits the image's mode and differs from sRGB."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data)).profile
        name = (profile.profile_description or "").lower()
        return mode in SPACES.get(profile.xcolor_space.strip(), ()) and "srgb" not in name
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False


def without_text(data: bytes) -> bytes:
    """Remove a PNG's text chunks and its ancillary chunks whose checksum is wrong; return other files
    unchanged.

    Pillow refuses a file with a text of over a megabyte (a ComfyUI workflow) or a wrong checksum, although
    its pixels are intact.
    """
    if not data.startswith(PNG):
        return data
    chunks = [data[:8]]
    begin = 8
    while begin + 12 <= len(data):
        size = int.from_bytes(data[begin : begin + 4], "big")
        kind = data[begin + 4 : begin + 8]
        end = begin + 12 + size
        ancillary = kind[:1].islower()  # decoders may skip such a chunk
        checksum = int.from_bytes(data[end - 4 : end], "big")
        if not ancillary or (kind not in TEXTS and zlib.crc32(data[begin + 4 : end - 4]) == checksum):
            chunks.append(data[begin:end])
        begin = end
    return b"".join([*chunks, data[begin:]])
