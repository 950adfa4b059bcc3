"""Picture bytes <-> RGB pixels: decoding as a viewer shows it, resizing, statistics, encoding with metadata.

Bytes are untrusted: formats by content from an allow-list, the pixel limit checked before anything is decoded.
Pixels are uint8 (H, W, 3) RGB; sizes are (width, height), as in Pillow. Knows no files and no torch (tensors.py).
"""

from __future__ import annotations

import io
import json
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features

from context_diffusion.config import Fit, Limits
from context_diffusion.errors import ErrorCode, RowError
from context_diffusion.schema import Pixels

Size = tuple[int, int]
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", *(["AVIF"] if features.check("avif") else [])]
MIN_SIDE, MAX_SIDE = 64, 2048  # what Settings allows
EXIF_BYTES = 60_000  # an EXIF block is one JPEG segment of 64 KiB
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def decode_image(data: bytes, limits: Limits, name: str, enough: Size | None = None) -> Pixels:
    """The RGB that a viewer shows: oriented by EXIF, transparency over white, the first frame, 8 bit.

    name: the file, for messages. enough: a JPEG may be decoded at 1/2, 1/4 or 1/8 if that still covers this size.
    Raises RowError NOT_AN_IMAGE, TRUNCATED_IMAGE (its pixels cannot be decoded), TOO_MANY_PIXELS.
    """
    image = _open(data, limits, name)
    try:
        if enough is not None:
            image.draft(None, enough)
        image.load()
    except (OSError, EOFError, SyntaxError, IndexError, RuntimeError) as error:
        raise RowError(ErrorCode.TRUNCATED_IMAGE, f"{name}: the picture is cut off or damaged: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to: struct.error, KeyError, ...
        raise RowError(ErrorCode.NOT_AN_IMAGE, f"{name}: cannot be decoded: {error!r}") from error
    try:
        return np.asarray(_to_rgb(_oriented(image)))
    except (ValueError, OSError) as error:
        raise RowError(ErrorCode.NOT_AN_IMAGE, f"{name}: pixels of mode {image.mode} are not read: {error}") from error


def _open(data: bytes, limits: Limits, name: str) -> Image.Image:
    """Reads the header only, and checks the size that it tells."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(ErrorCode.TOO_MANY_PIXELS, f"{name}: {error}; allowed are {limits.max_pixels} pixels") from error
    except MemoryError:
        raise
    except Exception as error:
        code = ErrorCode.TRUNCATED_IMAGE if _is_cut_off(data) else ErrorCode.NOT_AN_IMAGE
        what = "the picture is cut off" if code is ErrorCode.TRUNCATED_IMAGE else f"not one of {', '.join(FORMATS)}"
        raise RowError(code, f"{name}: {what} ({len(data)} bytes that begin with {data[:12]!r})") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} = {width * height} pixels, allowed are {limits.max_pixels}"
        raise RowError(ErrorCode.TOO_MANY_PIXELS, message)
    return image


def _is_cut_off(data: bytes) -> bool:
    """A picture by its first bytes whose header does not read: WebP says its length, others are just too short."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    return data.startswith(known) or data[4:12] == b"ftypavif"


def _oriented(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a viewer shows a picture with a broken EXIF block as it lies
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparency over white. Pillow itself clips what has more than 8 bit; here it is scaled."""
    if image.mode.startswith("I"):
        image = Image.fromarray(_scaled(np.asarray(image), 65535))
    elif image.mode == "F":
        values = np.asarray(image)
        image = Image.fromarray(_scaled(values, 1.0 if values.size and np.nanmax(values) <= 1 else 255.0))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scaled(values: NDArray[Any], highest: float) -> Pixels:
    scaled = np.nan_to_num(values.astype(np.float32)) * np.float32(255 / highest)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def output_size(
    fit: Fit,
    query_width: int,
    query_height: int,
    width: int | None,
    height: int | None,
    model_size: int,
    multiple: int = 16,
) -> Size:
    """The size (width, height) of a row's output.

    A width or height that is given wins. `keep`: the query's aspect ratio at the model's number of pixels
    (model_size squared), or at the side that is given; else what is not given is model_size.
    """
    if fit != "keep" or (width and height):
        return width or model_size, height or model_size

    def side(pixels: float) -> int:
        return min(max(round(pixels / multiple) * multiple, MIN_SIDE), MAX_SIDE)

    aspect = query_width / query_height
    if width or height:
        return width or side((height or 0) * aspect), height or side((width or 0) / aspect)
    return side(model_size * math.sqrt(aspect)), side(model_size / math.sqrt(aspect))


def resize(pixels: Pixels, width: int, height: int, fit: Fit) -> Pixels:
    """uint8 (H, W, 3) -> (height, width, 3).

    crop, keep: covers the size, what stands over is cut equally on both sides. pad: fits inside, the rest takes the
    picture's mean colour. stretch: the aspect ratio changes.
    """
    old_height, old_width = pixels.shape[:2]
    if (old_width, old_height) == (width, height):
        return pixels
    image = Image.fromarray(pixels)
    if fit == "stretch":
        return np.asarray(_scale(image, (width, height)))
    if fit == "pad":
        factor = min(width / old_width, height / old_height)
        inner = (min(width, max(1, round(old_width * factor))), min(height, max(1, round(old_height * factor))))
        mean = pixels.reshape(-1, 3).mean(axis=0)
        padded = np.empty((height, width, 3), np.uint8)
        padded[:] = np.rint(mean)
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        padded[top : top + inner[1], left : left + inner[0]] = np.asarray(_scale(image, inner))
        return padded
    factor = max(width / old_width, height / old_height)
    part = (min(width / factor, old_width), min(height / factor, old_height))
    left_edge, top_edge = (old_width - part[0]) / 2, (old_height - part[1]) / 2
    return np.asarray(_scale(image, (width, height), (left_edge, top_edge, left_edge + part[0], top_edge + part[1])))


def _scale(image: Image.Image, size: Size, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    # The gap of 3 lets Pillow shrink large pictures by whole steps first: faster, with no difference that one sees.
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def statistics(pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel, (3,) each, float32, for values in [0, 1]."""
    flat = pixels.reshape(-1, 3)
    return (flat.mean(axis=0) / 255).astype(np.float32), (flat.std(axis=0) / 255).astype(np.float32)


def encode_image(pixels: Pixels, image_format: Literal["png", "webp", "jpeg"], metadata: dict[str, str]) -> bytes:
    """The bytes of a picture file, equal for equal arguments.

    PNG holds a text chunk for each entry. WebP (lossless) and JPEG (quality 95, 4:4:4) hold all of them as JSON in
    EXIF's UserComment, long texts shortened if the block would be too large. All say in XMP that a model made them.
    """
    image, sink = Image.fromarray(pixels), io.BytesIO()
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", XMP.decode())
        for key, text in metadata.items():
            chunks.add_text(key, text.replace("\0", "\ufffd"))  # iTXt by itself where Latin-1 does not do
        image.save(sink, "PNG", compress_level=1, pnginfo=chunks)
    elif image_format == "webp":
        image.save(sink, "WEBP", lossless=True, quality=20, method=0, exif=_exif(metadata), xmp=XMP)
    else:
        image.save(sink, "JPEG", quality=95, subsampling=0, exif=_exif(metadata), xmp=XMP)
    return sink.getvalue()


def _exif(metadata: dict[str, str]) -> bytes:
    def comment(longest: int | None) -> bytes:
        return b"UNICODE\0" + json.dumps({k: v[:longest] for k, v in metadata.items()}, ensure_ascii=False).encode(
            "utf-16-be", "replace"
        )

    text = comment(None)
    if len(text) > EXIF_BYTES:  # the row in data/ has them whole
        text = comment(EXIF_BYTES // (6 * max(1, len(metadata))))[:EXIF_BYTES]
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = text
    return exif.tobytes()
