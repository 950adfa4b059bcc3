"""Decodes image files to the RGB pixels that a viewer shows, resizes them and computes their statistics.

The bytes are untrusted: their format is detected from the content and must be one of FORMATS, and the pixel
limit is checked before anything is decoded. Pixels are uint8 (H, W, 3) RGB; sizes are (width, height), as in
Pillow. Knows no files and no torch (image_tensors.py). outputs/encode.py encodes images.
"""

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
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")  # of image file names
BAND_PIXELS = 2**20  # pixels that are converted to RGB at once
MAX_SCANS = 100  # of a JPEG: each scan processes all pixels again; progressive JPEGs usually have about ten
MIN_SIDE, MAX_SIDE = 64, 2048  # the range that Settings allows
WARNING_FILTERS = threading.Lock()


def decode_image(data: bytes, limits: Limits, name: str = "image", background: str = "white") -> Pixels:
    """Decode an image file as a viewer shows it: oriented by EXIF, transparency over white, the first frame,
    8 bit.

    name: the file, for messages. background: the colour behind what is transparent. Raises RowError:
    NOT_AN_IMAGE; TRUNCATED_IMAGE if the header is valid but the pixels cannot be decoded; TOO_MANY_PIXELS
    before they are decoded; OUT_OF_MEMORY.
    """
    return _decoded(open_image(data, limits, name), name, background)


def decode_resized(
    data: bytes, limits: Limits, name: str, size_of: Callable[[int, int], Size], fit: Fit
) -> Pixels:
    """Decode an image file and resize it. size_of: computes the output's width and height from the image's.

    A JPEG that is far larger is decoded at a half, a quarter or an eighth of its sides, never below the
    output's size. This takes a sixth of the time, and the pixels differ by about one level
    (tests/benchmarks/LOG.md). Raises RowError as decode_image does.
    """
    image = open_image(data, limits, name)
    orientation = _orientation(image)
    file_width, file_height = image.size
    turned = orientation in (5, 6, 7, 8)
    width, height = size_of(file_height, file_width) if turned else size_of(file_width, file_height)
    needed = (height, width) if turned else (width, height)
    factor = max(needed[0] / file_width, needed[1] / file_height)
    draft_size = (math.ceil(file_width * factor), math.ceil(file_height * factor))
    draft = image.draft(None, draft_size)  # None: no JPEG
    extent: tuple[float, float] = draft[1][2:] if draft else image.size
    if orientation != 1 and extent != image.size:  # rotation would move the partial last row and column
        image = open_image(data, limits, name)
        extent = image.size
    return resize(_decoded(image, name), width, height, fit, extent[::-1] if turned else extent)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 5 and above swap width and height."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the EXIF block is broken: the image is not turned
        return 1


def _decoded(image: Image.Image, name: str, background: str = "white") -> Pixels:
    try:
        return rgb_pixels(image, background)
    except Exception as error:  # Pillow's decoders may raise any exception: struct.error, KeyError, ...
        raise _row_error(
            error, ErrorCode.TRUNCATED_IMAGE, f"{name}: the image is truncated or damaged"
        ) from error


def open_image(data: bytes, limits: Limits, name: str, texts: bool = False) -> Image.Image:
    """Read an image file's header and check its size. Raises RowError as decode_image does.

    texts: whether a PNG's texts are kept, whose size Pillow limits.
    """
    try:
        image = _read_header(data if texts else without_text(data))
    except Exception as error:
        code = ErrorCode.NOT_AN_IMAGE
        problem = f"its format is not one of {', '.join(FORMATS)}"
        if _is_truncated(data):
            code = ErrorCode.TRUNCATED_IMAGE
            problem = "its header is truncated or damaged"
        message = f"{name}: {problem}; it has {len(data)} bytes and begins with {data[:12]!r}"
        raise _row_error(error, code, message) from error
    width, height = image.size
    if width * height > limits.max_pixels:
        pixels = f"{width} x {height} = {width * height} pixels"
        raise RowError(
            ErrorCode.TOO_MANY_PIXELS, f"{name}: {pixels}, at most {limits.max_pixels} are allowed"
        )
    if image.format == "JPEG":
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            message = f"{name}: a JPEG with {scans} scans, at most {MAX_SCANS} are allowed"
            raise RowError(ErrorCode.NOT_AN_IMAGE, message)
    return image


def format_of(data: bytes) -> Literal["png", "webp", "jpeg"]:
    """Return an image file's format as encode_image names it; png for all other formats. Raises RowError."""
    pillow_format = open_image(data, Limits(), "image").format
    return "webp" if pillow_format == "WEBP" else "jpeg" if pillow_format == "JPEG" else "png"


def _read_header(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Warning:
        # Raised only where warnings are errors. The process shares the filters: they are changed rarely.
        with WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)


def _row_error(error: Exception, code: ErrorCode, message: str) -> RowError:
    """Return the RowError of an exception of Pillow. code: that of exceptions without a code of their own."""
    if isinstance(error, MemoryError):
        code = ErrorCode.OUT_OF_MEMORY
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        code = ErrorCode.TOO_MANY_PIXELS  # Pillow's own limit, about 179 MP
    elif isinstance(error, UnidentifiedImageError):
        return RowError(code, message)  # its own message names only the address of the buffer
    return RowError(code, f"{message}: {type(error).__name__}: {error}")


def _is_truncated(data: bytes) -> bool:
    """Return whether bytes begin like an image file; a WebP must be shorter than its header states."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    signatures = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    return data.startswith(signatures) or data[4:12] == b"ftypavif"


def rgb_pixels(image: Image.Image, background: str = "white") -> Pixels:
    """Convert a Pillow image of any mode to RGB pixels (H, W, 3), as a viewer shows it.

    The image is turned by its EXIF orientation, in sRGB, over a background, with 8 bit.
    """
    image.load()
    if _orientation(image) != 1:
        with contextlib.suppress(Exception):  # viewers do not turn an image with a broken EXIF block
            image = ImageOps.exif_transpose(image)
    return _to_rgb(in_srgb(image), background)


def _to_rgb(image: Image.Image, background: str) -> Pixels:
    """Convert an image of any mode to RGB, (H, W, 3), over a background.

    Modes other than RGB are converted in bands, since the intermediate images need several times the memory.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.asarray(image)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)

    def bands() -> Iterator[tuple[int, Image.Image]]:
        return ((top, image.crop((0, top, width, min(top + rows, height)))) for top in range(0, height, rows))

    white = max(_white_level(band) for _, band in bands()) if image.mode == "F" else 65535.0
    for top, band in bands():
        pixels[top : top + band.height] = (
            _scaled(band, white) if image.mode[0] in "IF" else _over(band, background)
        )
    return pixels


def _over(image: Image.Image, background: str) -> Pixels:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return np.asarray(image.convert("RGB"))


def _scaled(image: Image.Image, white: float) -> Pixels:
    """Scale grey values of more than 8 bit, which Pillow would clip, to 8 bit. white: the value of white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the level that PNG shows as transparent
        values[values == transparent] = white
    return np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)[:, :, None]


def _white_level(image: Image.Image) -> float:
    """Guess the value of white in a float image: the smallest of 1, 255 and 65535 that no value exceeds."""
    largest = np.nan_to_num(np.asarray(image)).max()
    return next((level for level in (1.0, 255.0) if largest <= level), 65535.0)


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

    A given width or height takes precedence, and the missing one is model_size. Else, with `keep`: the
    query's aspect ratio at the model's number of pixels, with sides that are multiples of `multiple` in the
    range of Settings; with other fits: model_size squared.
    """
    if fit != "keep" or width or height:
        return width or model_size, height or model_size
    lowest = math.ceil(MIN_SIDE / multiple) * multiple
    highest = MAX_SIDE // multiple * multiple

    def side(pixels: float) -> int:
        return min(max(round(pixels / multiple) * multiple, lowest), highest)

    aspect = math.sqrt(query_width / query_height)
    return side(model_size * aspect), side(model_size / aspect)


def reference_output_size(
    fit: Fit, query: Pixels, width: int | None, height: int | None, model_size: int
) -> Size:
    """Return the size (width, height) of a row's output where the query is a reference of any size.

    A given width or height takes precedence, and the missing one is the query's. Else, with `keep`, it is
    that of output_size; with other fits the query's."""
    query_height, query_width = query.shape[:2]
    if fit == "keep" and not width and not height:
        return output_size(fit, query_width, query_height, None, None, model_size)
    return width or query_width, height or query_height


def resize(
    pixels: Pixels, width: int, height: int, fit: Fit, extent: tuple[float, float] | None = None
) -> Pixels:
    """Resize pixels, uint8 (H, W, 3), to (height, width, 3).

    crop: covers the size and crops both sides equally; pad: fits inside the size and fills the rest with
    the mean colour; stretch, keep: plain resize (output_size has set the aspect ratio of `keep`). extent: the
    real width and height, if the last column and row are only partly filled.
    """
    old_width, old_height = extent or (pixels.shape[1], pixels.shape[0])
    if (old_width, old_height) == (width, height):
        return pixels
    if fit == "pad":
        return _padded(pixels, width, height, old_width, old_height)
    box = (0.0, 0.0, old_width, old_height)
    if fit == "crop":
        factor = max(width / old_width, height / old_height)
        part_width, part_height = min(width / factor, old_width), min(height / factor, old_height)
        left, top = (old_width - part_width) / 2, (old_height - part_height) / 2
        box = (left, top, left + part_width, top + part_height)
    return np.asarray(_scale(Image.fromarray(pixels), (width, height), box))


def _padded(pixels: Pixels, width: int, height: int, old_width: float, old_height: float) -> Pixels:
    factor = min(width / old_width, height / old_height)
    inner_width = min(width, max(1, round(old_width * factor)))
    inner_height = min(height, max(1, round(old_height * factor)))
    padded = np.empty((height, width, 3), np.uint8)
    padded[:] = np.rint(pixels.reshape(-1, 3).mean(axis=0))
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    scaled = _scale(Image.fromarray(pixels), (inner_width, inner_height), (0, 0, old_width, old_height))
    padded[top : top + inner_height, left : left + inner_width] = np.asarray(scaled)
    return padded


def _scale(image: Image.Image, size: Size, box: tuple[float, float, float, float]) -> Image.Image:
    # With this gap Pillow first reduces large images by integer factors: faster, with no visible difference.
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Return the mean and the (population) std of each channel, for values in [0, 1]."""
    # Pillow's histogram: numpy's mean and std take 20 times as long.
    histogram = np.reshape(Image.fromarray(pixels).histogram(), (3, 256))
    shares = histogram / (pixels.size // 3)
    values = np.arange(256) / 255
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    return mean.tolist(), std.tolist()
