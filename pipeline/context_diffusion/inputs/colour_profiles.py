"""What a viewer does before the pixels are seen: colour profiles turned into sRGB, broken or huge text left aside.

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
    """A loaded image in sRGB, by its ICC profile. One without a profile, with sRGB's or with a broken one stays as it is."""
    data = image.info.get("icc_profile")
    if not data or "transparency" in image.info or not _matters(data, image.mode):
        return image
    try:
        wanted = image.mode if image.mode == "RGBA" else "RGB"
        source = ImageCms.ImageCmsProfile(io.BytesIO(data))
        converted = ImageCms.profileToProfile(image, source, SRGB, ImageCms.Intent.RELATIVE_COLORIMETRIC, wanted)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image


@lru_cache(maxsize=256)
def _matters(data: bytes, mode: str) -> bool:
    """Whether a profile is readable, of the image's colour space, and another one than sRGB."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data)).profile
        name = (profile.profile_description or "").lower()
        return mode in SPACES.get(profile.xcolor_space.strip(), ()) and "srgb" not in name
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False


def without_text(data: bytes) -> bytes:
    """A PNG without its texts and without side chunks whose checksum is wrong: its pixels are intact, but Pillow refuses the
    file for a text of over a megabyte (a ComfyUI workflow) or a wrong checksum. Others as they are."""
    if not data.startswith(PNG):
        return data
    pieces, begin, dropped = [data[:8]], 8, False
    while begin + 12 <= len(data):
        size, kind = int.from_bytes(data[begin : begin + 4], "big"), data[begin + 4 : begin + 8]
        end = begin + 12 + size
        if kind[:1].islower():  # a side chunk: readers may leave it out
            body = data[begin + 4 : end - 4]
            if kind in TEXTS or zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
                dropped, begin = True, end
                continue
        pieces.append(data[begin:end])
        begin = end
    return b"".join([*pieces, data[begin:]]) if dropped else data
