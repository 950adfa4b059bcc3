"""Decode image files to RGB pixels as a viewer shows them; resizing; statistics. (outputs/encode.py encodes.)

Bytes are untrusted: formats by content from an allow-list, the pixel limit checked before anything is
decoded. Pixels are uint8 (H, W, 3) RGB; sizes are (width, height), as in Pillow. Knows no files and no torch
(image_tensors.py)."""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.records import Pixels
from context_diffusion.inputs.colour_profiles import in_srgb, without_text

Size = tuple[int, int]
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", *(["AVIF"] if features.check("avif") else [])]
# of image files' names
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
BAND_PIXELS = 2**20
MAX_SCANS = 100  # of a JPEG: each decodes all pixels again; usual progressive files have about ten
MIN_SIDE, MAX_SIDE = 64, 2048  # what Settings allows
WARNING_FILTERS = threading.Lock()


def decode_image(data: bytes, limits: Limits, name: str = "image") -> Pixels:
    """Decode the RGB that a viewer shows: oriented by EXIF, transparency over white, the first frame, 8 bit.

    name: the file, for messages. Raises RowError NOT_AN_IMAGE; TRUNCATED_IMAGE, a good header whose pixels
    cannot be decoded; TOO_MANY_PIXELS, before they are; OUT_OF_MEMORY."""
    return _decoded(open_image(data, limits, name), name)


def decode_resized(data: bytes, limits: Limits, name: str, size_of: Callable[[int, int], Size], fit: Fit) -> Pixels:
    """Decode and resize an image. size_of: computes the wanted (width, height) from the image's.

    A JPEG that is far larger is decoded at a half, a quarter or an eighth of its sides, never below the
    wanted size: in a sixth of the time, with pixels within about a level of the full decoding
    (tests/benchmarks/LOG.md). Raises as decode_image does."""
    image = open_image(data, limits, name)
    orientation = _orientation(image)
    wide, tall = image.size
    turned = orientation in (5, 6, 7, 8)
    width, height = size_of(tall, wide) if turned else size_of(wide, tall)
    needed = max(height / wide, width / tall) if turned else max(width / wide, height / tall)
    small = image.draft(None, (math.ceil(wide * needed), math.ceil(tall * needed)))  # None: no JPEG
    extent: tuple[float, float] = small[1][2:] if small else image.size
    if orientation != 1 and extent != image.size:  # a partial last row would be at another edge
        image = open_image(data, limits, name)
        extent = image.size
    return resize(_decoded(image, name), width, height, fit, extent[::-1] if turned else extent)


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; from 5 on width and height are swapped."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block: the image is shown as stored
        return 1


def _decoded(image: Image.Image, name: str) -> Pixels:
    try:
        return shown(image)
    # Pillow's decoders raise whatever the bytes lead them to: struct.error, KeyError, ...
    except Exception as error:
        raise _row_error(error, ErrorCode.TRUNCATED_IMAGE, f"{name}: the picture is cut off or damaged") from error


def open_image(data: bytes, limits: Limits, name: str, texts: bool = False) -> Image.Image:
    """Read the header only, and check the size that it states. texts: keep a PNG's texts, whose size Pillow
    limits."""
    try:
        image = _read_header(data if texts else without_text(data))
    except Exception as error:
        code = ErrorCode.NOT_AN_IMAGE
        what = f"not one of {', '.join(FORMATS)}"
        if _is_cut_off(data):
            code = ErrorCode.TRUNCATED_IMAGE
            what = "its header is cut off or damaged"
        raise _row_error(error, code, f"{name}: {what}, {len(data)} bytes that begin with {data[:12]!r}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} = {width * height} pixels, allowed are {limits.max_pixels}"
        raise RowError(ErrorCode.TOO_MANY_PIXELS, message)
    if image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise RowError(ErrorCode.NOT_AN_IMAGE, f"{name}: a JPEG of {scans} scans, read are up to {MAX_SCANS}")
    return image


def format_of(data: bytes) -> Literal["png", "webp", "jpeg"]:
    """Return the format of an image file if encode_image writes it, else png. Raises RowError as open_image
    does."""
    named = open_image(data, Limits(), "image").format
    return "webp" if named == "WEBP" else "jpeg" if named == "JPEG" else "png"


def _read_header(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Warning:
        # Only where warnings are errors. Filters are global to the process, so they are changed as rarely as
        # possible.
        with WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)


def _row_error(error: Exception, code: ErrorCode, what: str) -> RowError:
    if isinstance(error, MemoryError):
        code = ErrorCode.OUT_OF_MEMORY
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        code = ErrorCode.TOO_MANY_PIXELS  # Pillow's own limit, about 179 MP, whatever ours is
    elif isinstance(error, UnidentifiedImageError):
        return RowError(code, what)  # its message has only the address of our buffer
    return RowError(code, f"{what}: {type(error).__name__}: {error}")


def _is_cut_off(data: bytes) -> bool:
    """Return whether bytes without a readable header are a truncated image: by WebP's length, or known first
    bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    return data.startswith(known) or data[4:12] == b"ftypavif"


def shown(image: Image.Image) -> Pixels:
    """Return what a viewer shows of a Pillow image of any mode, (H, W, 3): oriented, in sRGB, over white, 8
    bit."""
    image.load()
    if _orientation(image) != 1:
        with contextlib.suppress(Exception):  # a viewer shows an image with a broken EXIF block as stored
            image = ImageOps.exif_transpose(image)
    return _to_rgb(in_srgb(image))


def _to_rgb(image: Image.Image) -> Pixels:
    """Convert any mode to (H, W, 3). In bands if it is not RGB: the intermediate images would need several
    times its memory."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.asarray(image)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)

    def bands() -> Iterator[tuple[int, Image.Image]]:
        return ((top, image.crop((0, top, width, min(top + rows, height)))) for top in range(0, height, rows))

    highest = max(_highest(band) for _, band in bands()) if image.mode == "F" else 65535.0
    for top, band in bands():
        pixels[top : top + band.height] = _scaled(band, highest) if image.mode[0] in "IF" else _over_white(band)
    return pixels


def _over_white(image: Image.Image) -> Pixels:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _scaled(image: Image.Image, highest: float) -> Pixels:
    """Scale grey of more than 8 bit, which Pillow itself would clip."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the single level that PNG treats as transparent
        values[values == transparent] = highest
    return np.rint(np.clip(values / highest, 0, 1) * 255).astype(np.uint8)[:, :, None]


def _highest(image: Image.Image) -> float:
    """Return the range of float values, which no file states: the smallest usual one that holds all
    values."""
    largest = np.nan_to_num(np.asarray(image)).max()
    return next((top for top in (1.0, 255.0) if largest <= top), 65535.0)


def output_size(
    fit: Fit,
    query_width: int,
    query_height: int,
    width: int | None,
    height: int | None,
    model_size: int,
    multiple: int = 16,
) -> Size:
    """Return the size (width, height) of a row's output.

    A given width or height is used, and the other is then model_size. `keep`: the query's aspect ratio at the
    model's number of pixels, sides multiples of `multiple` within what Settings allows. Else model_size
    squared."""
    if fit != "keep" or width or height:
        return width or model_size, height or model_size
    lowest, highest = math.ceil(MIN_SIDE / multiple) * multiple, MAX_SIDE // multiple * multiple

    def side(pixels: float) -> int:
        return min(max(round(pixels / multiple) * multiple, lowest), highest)

    aspect = math.sqrt(query_width / query_height)
    return side(model_size * aspect), side(model_size / aspect)


def resize(pixels: Pixels, width: int, height: int, fit: Fit, extent: tuple[float, float] | None = None) -> Pixels:
    """Resize uint8 (H, W, 3) to (height, width, 3).

    crop: the image covers the size, and the excess is cut equally on both sides. pad: it fits inside, and the
    rest has its mean colour. stretch, keep: a plain resize; for keep, output_size has kept the aspect ratio.
    extent: the exact width and height of the image, if its last column and row are only partly filled."""
    old_width, old_height = extent or (pixels.shape[1], pixels.shape[0])
    if (old_width, old_height) == (width, height):
        return pixels
    image = Image.fromarray(pixels)
    if fit in ("stretch", "keep"):
        return np.asarray(_scale(image, (width, height), (0, 0, old_width, old_height)))
    if fit == "pad":
        factor = min(width / old_width, height / old_height)
        inner = (min(width, max(1, round(old_width * factor))), min(height, max(1, round(old_height * factor))))
        mean = pixels.reshape(-1, 3).mean(axis=0)
        padded = np.empty((height, width, 3), np.uint8)
        padded[:] = np.rint(mean)
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        scaled = _scale(image, inner, (0, 0, old_width, old_height))
        padded[top : top + inner[1], left : left + inner[0]] = np.asarray(scaled)
        return padded
    factor = max(width / old_width, height / old_height)
    part = (min(width / factor, old_width), min(height / factor, old_height))
    left_edge, top_edge = (old_width - part[0]) / 2, (old_height - part[1]) / 2
    return np.asarray(_scale(image, (width, height), (left_edge, top_edge, left_edge + part[0], top_edge + part[1])))


def _scale(image: Image.Image, size: Size, box: tuple[float, float, float, float]) -> Image.Image:
    # The gap of 3 lets Pillow shrink large images by whole factors first: faster, with no visible difference.
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Return the mean and the (population) std of each channel, for values in [0, 1]."""
    counts = np.reshape(Image.fromarray(pixels).histogram(), (3, 256)) / (
        pixels.size // 3
    )  # numpy's own functions take 20 times as long
    values = np.arange(256) / 255
    mean = counts @ values
    return mean.tolist(), np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1)).tolist()
