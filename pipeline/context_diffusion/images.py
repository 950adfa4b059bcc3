"""Picture bytes <-> RGB pixels: decoding as a viewer shows it, resizing, statistics, encoding with metadata.

Bytes are untrusted: formats by content from an allow-list, the pixel limit checked before anything is decoded.
Pixels are uint8 (H, W, 3) RGB; sizes are (width, height), as in Pillow. Knows no files and no torch (tensors.py).
"""

from __future__ import annotations

import io
import json
import math
import threading
import warnings
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, features

from context_diffusion.config import Fit, Limits
from context_diffusion.errors import ErrorCode, RowError
from context_diffusion.schema import Pixels

Size = tuple[int, int]
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", *(["AVIF"] if features.check("avif") else [])]
MIN_SIDE, MAX_SIDE = 64, 2048  # what Settings allows
EXIF_BYTES = 60_000  # an EXIF block is one JPEG segment of 64 KiB
UNICODE = b"UNICODE\0"  # EXIF's name for UTF-16, before the text of a UserComment
XMP_KEY = "XML:com.adobe.xmp"  # of PNG's chunk
WARNING_FILTERS = threading.Lock()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def decode_image(data: bytes, limits: Limits, name: str = "image") -> Pixels:
    """The RGB that a viewer shows: oriented by EXIF, transparency over white, the first frame, 8 bit.

    name: the file, for messages. Raises RowError NOT_AN_IMAGE; TRUNCATED_IMAGE, a good header whose pixels cannot be
    decoded; TOO_MANY_PIXELS, before they are; OUT_OF_MEMORY.
    """
    image = _open(data, limits, name)
    try:
        return shown(image)
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to: struct.error, KeyError, ...
        raise _row_error(error, ErrorCode.TRUNCATED_IMAGE, f"{name}: the picture is cut off or damaged") from error


def _open(data: bytes, limits: Limits, name: str) -> Image.Image:
    """Reads the header only, and checks the size that it tells."""
    try:
        image = _read_header(data)
    except Exception as error:
        code, what = ErrorCode.NOT_AN_IMAGE, f"not one of {', '.join(FORMATS)}"
        if _is_cut_off(data):
            code, what = ErrorCode.TRUNCATED_IMAGE, "its header is cut off or damaged"
        raise _row_error(error, code, f"{name}: {what}, {len(data)} bytes that begin with {data[:12]!r}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        message = f"{name}: {width} x {height} = {width * height} pixels, allowed are {limits.max_pixels}"
        raise RowError(ErrorCode.TOO_MANY_PIXELS, message)
    return image


def _read_header(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Warning:
        # Only where warnings are errors. The filters belong to the whole process: they are changed as rarely as can be.
        with WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)


def _row_error(error: Exception, code: ErrorCode, what: str) -> RowError:
    if isinstance(error, MemoryError):
        code = ErrorCode.OUT_OF_MEMORY
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        code = ErrorCode.TOO_MANY_PIXELS  # Pillow's own limit, about 179 MP, whatever ours is
    return RowError(code, f"{what}: {type(error).__name__}: {error}")


def _is_cut_off(data: bytes) -> bool:
    """A picture by its first bytes whose header does not read: WebP says its length, others are just too short."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
    return data.startswith(known) or data[4:12] == b"ftypavif"


def shown(image: Image.Image) -> Pixels:
    """What a viewer shows of a Pillow image of any mode, (H, W, 3): oriented, over white, 8 bit."""
    image.load()
    try:
        oriented = ImageOps.exif_transpose(image)
    except Exception:  # a viewer shows a picture with a broken EXIF block as it lies
        oriented = image
    return np.asarray(_to_rgb(oriented))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Pillow itself clips what has more than 8 bit; here it is scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        highest = 65535.0
        if image.mode == "F":  # nothing tells the range: the least of the usual ones that holds all values
            highest = next((top for top in (1.0, 255.0) if values.max() <= top), highest)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):  # the one level that PNG shows as transparent
            values[values == transparent] = highest
        return Image.fromarray(np.rint(np.clip(values / highest, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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

    A width or height that is given wins, and the other is then model_size. `keep`: the query's aspect ratio at the
    model's number of pixels, sides multiples of `multiple` within what Settings allows. Else model_size squared.
    """
    if fit != "keep" or width or height:
        return width or model_size, height or model_size
    lowest, highest = math.ceil(MIN_SIDE / multiple) * multiple, MAX_SIDE // multiple * multiple

    def side(pixels: float) -> int:
        return min(max(round(pixels / multiple) * multiple, lowest), highest)

    aspect = math.sqrt(query_width / query_height)
    return side(model_size * aspect), side(model_size / aspect)


def resize(pixels: Pixels, width: int, height: int, fit: Fit) -> Pixels:
    """uint8 (H, W, 3) -> (height, width, 3).

    crop: covers the size, what stands over is cut equally on both sides. pad: fits inside, the rest takes the picture's
    mean colour. stretch, keep: a plain resize; with keep, output_size has seen to the aspect ratio.
    """
    old_height, old_width = pixels.shape[:2]
    if (old_width, old_height) == (width, height):
        return pixels
    image = Image.fromarray(pixels)
    if fit in ("stretch", "keep"):
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


def statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (of the population) of each channel, for values in [0, 1]."""
    flat = pixels.reshape(-1, 3)  # (H*W, 3)
    return (flat.mean(axis=0) / 255).tolist(), (flat.std(axis=0) / 255).tolist()


def encode_image(pixels: Pixels, image_format: Literal["png", "webp", "jpeg"], metadata: dict[str, str]) -> bytes:
    """The bytes of a picture file, equal for equal arguments; `read_metadata` reads the metadata back.

    PNG holds a text chunk for each entry. WebP (lossless) and JPEG (quality 95, 4:4:4) hold all of them as JSON in
    EXIF's UserComment, in JPEG with long texts cut if the block would be too large. All say in XMP that a model made
    them.
    """
    image, sink = Image.fromarray(pixels), io.BytesIO()
    metadata = {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}  # no lone surrogates
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(XMP_KEY, XMP.decode())
        for key, text in metadata.items():
            chunks.add_text(key, text.replace("\0", "\ufffd"))  # iTXt by itself where Latin-1 does not do
        image.save(sink, "PNG", compress_level=1, pnginfo=chunks)
    elif image_format == "webp":
        image.save(sink, "WEBP", lossless=True, quality=20, method=0, exif=_exif(_comment(metadata)), xmp=XMP)
    else:
        comment, longest = _comment(metadata), max(map(len, metadata.values()), default=0)
        while len(comment) > EXIF_BYTES and longest:  # the row in data/ has them whole
            longest //= 2
            comment = _comment({key: text[:longest] for key, text in metadata.items()})
        image.save(sink, "JPEG", quality=95, subsampling=0, exif=_exif(comment), xmp=XMP)
    return sink.getvalue()


def _comment(metadata: dict[str, str]) -> bytes:
    return UNICODE + json.dumps(metadata, ensure_ascii=False).encode("utf-16-be")


def _exif(comment: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def read_metadata(data: bytes) -> dict[str, str]:
    """What encode_image stored; of another's PNG its text chunks, of another's JPEG or WebP nothing.

    Raises RowError as decode_image does, for the header.
    """
    image = _open(data, Limits(), "image")
    if image.format == "PNG":
        texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
        return {key: str(text) for key, text in texts.items() if key != XMP_KEY}  # plain str: Pillow's has a language
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        stored = json.loads(comment.removeprefix(UNICODE).decode("utf-16-be"))
    except Exception:  # no EXIF, a broken one, or another's comment
        return {}
    return {str(key): str(text) for key, text in stored.items()} if isinstance(stored, dict) else {}
