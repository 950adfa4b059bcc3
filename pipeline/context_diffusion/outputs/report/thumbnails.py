"""Reads the images that the report and the viewer show, in full or as thumbnails: outputs, queries, contexts.

The names in a row are untrusted: sources are read under the rules of OUTPUT's job, and a file_name must lie
in images/ or webdataset/ of OUTPUT.
"""

from __future__ import annotations

import io
import re
import threading
from typing import Any

from PIL import Image

from context_diffusion.core.errors import ContextDiffusionError, ErrorCode, RowError, StorageError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.uris import resolve
from context_diffusion.inputs.decode import Size, decode_resized, open_image
from context_diffusion.inputs.image_sources import INLINE, read_bytes
from context_diffusion.outputs.output_folder import Output, base_of
from context_diffusion.storage.filesystem import Storage

OUTPUT_SIDE = 256  # pixels of the longer side of an output's thumbnail
SOURCE_SIDE = 128  # pixels of the longer side of a query's or context's thumbnail
THREADS = 4  # each may decode an image of limits.max_pixels
SOURCE_TIMEOUT_S = 5.0
MAX_UNAVAILABLE = 3  # sources that storage could not provide, before no more are read
Frame = tuple[int, int]  # width and height of a query's thumbnail, to which the job's `fit` crops or pads it
OUTPUT_FILE = re.compile(r"(images/part-\d{5,}|webdataset/part-\d{5,}\.tar)/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class ImageReader:
    """Reads the images of one OUTPUT. plan: the content of its plan.json. It may be used by several
    threads."""

    def __init__(self, output: Output, plan: Any) -> None:
        job = GenerateJob.model_validate(plan["job"])
        self._output = output
        self._limits = job.limits
        self._fit = job.fit
        self._base = base_of(plan)
        self._allow = plan["allow"]
        self._storage = Storage(job.storage_options, deadline_s=SOURCE_TIMEOUT_S)
        self._unavailable = 0
        self._tar_lock = threading.Lock()
        # Columns that contain the images. A part with images is held in memory by one thread at a time.
        self.columns = ["image"] if job.images_in == "parquet" else []
        self.threads = 1 if self.columns else THREADS

    def output_image(self, row: dict[str, Any]) -> tuple[bytes, str]:
        """Return a finished row's image file and its media type. Raises RowError, StorageError."""
        data = self._output_bytes(row)
        name = row["file_name"] or row["id"]
        return data, Image.MIME[open_image(data, Limits(), name).format or "PNG"]

    def _output_bytes(self, row: dict[str, Any]) -> bytes:
        name = row["file_name"]
        if row.get("image"):
            return self._output.image(row)
        if not name or not OUTPUT_FILE.fullmatch(name):
            message = f"{row['id']}: {str(name)[:200]!r} is not an image of this OUTPUT"
            raise RowError(ErrorCode.MISSING_FILE, message)
        try:
            if ".tar/" not in name:
                return self._output.image(row)
            with self._tar_lock:  # Output holds one tar at a time
                return self._output.image(row)
        except (FileNotFoundError, KeyError):
            raise RowError(ErrorCode.MISSING_FILE, f"{name} is missing from {self._output.root}") from None

    def output_thumbnail(self, row: dict[str, Any]) -> bytes | None:
        """Return a WebP thumbnail of a row's image; None if the image is missing or damaged."""
        try:
            return thumbnail(self._output_bytes(row), OUTPUT_SIDE, Limits())
        except RowError:
            return None

    def source_thumbnail(self, uri: str | None, frame: Frame | None = None) -> bytes | None:
        """Return a WebP thumbnail of a query or context; None if it was inline, is missing or is not allowed.

        frame: of a query, from frame_of; default: the whole image.
        """
        if uri is None or uri == INLINE or self._unavailable >= MAX_UNAVAILABLE:
            return None
        source = {"bytes": None, "path": resolve(uri, self._base)}
        try:
            data = read_bytes(source, self._allow, self._limits, self._storage)
            return thumbnail(data, SOURCE_SIDE, self._limits, frame, self._fit)
        except StorageError:
            self._unavailable += 1
        except ContextDiffusionError:
            pass
        return None


def frame_of(row: dict[str, Any]) -> Frame | None:
    """Return the frame with the shape in which the model was given a row's query; None for a failed row."""
    if row["status"] != "ok" or not row["width"] or not row["height"]:
        return None
    return _size_within(SOURCE_SIDE, row["width"], row["height"])


def thumbnail(
    data: bytes, side: int, limits: Limits, frame: Frame | None = None, fit: Fit = "stretch"
) -> bytes:
    """Encode a WebP thumbnail of at most `side` pixels, or of a frame, to which `fit` brings the image.

    Raises RowError.
    """

    def size(width: int, height: int) -> Size:
        return frame or _size_within(side, width, height)

    sink = io.BytesIO()
    Image.fromarray(decode_resized(data, limits, "thumbnail", size, fit)).save(sink, "WEBP", quality=82)
    return sink.getvalue()


def _size_within(side: int, width: int, height: int) -> Size:
    factor = min(1.0, side / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))
