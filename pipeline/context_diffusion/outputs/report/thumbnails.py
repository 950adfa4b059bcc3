"""The images that the report and the viewer show: outputs, queries and contexts; whole or as thumbnails.

The URIs of rows are untrusted here too: sources are read under the rules of OUTPUT's job, and a file_name can
only name a file in images/ or webdataset/ of OUTPUT."""

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
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

MADE_SIDE, SOURCE_SIDE = 256, 128  # pixels of a thumbnail's longer side
THREADS = 4  # each may decode an image of limits.max_pixels
PATIENCE_S, PATIENCE = 5.0, 3  # timeout of a source; failures after which no source is read any more
Frame = tuple[int, int]  # width and height at which an image is shown, cropped or padded by the job's `fit`
OURS = re.compile(r"(images/part-\d{5,}|webdataset/part-\d{5,}\.tar)/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class Pictures:
    """The images of one OUTPUT. Threads may share it."""

    def __init__(self, output: Output) -> None:
        plan = output.read_json(output.plan)
        job = GenerateJob.model_validate(plan["job"])
        self._output, self._limits = output, job.limits
        # Columns needed to read a row's image; only one thread at a time holds a part's images.
        self.columns = ["image"] if job.images_in == "parquet" else []
        self.threads = 1 if self.columns else THREADS
        self._fit, self._base = job.fit, output.base()
        self._allow = plan["allow"]
        self._storage = Storage(job.storage_options, deadline_s=PATIENCE_S)
        self._in_vain, self._tars = 0, threading.Lock()

    def made(self, row: dict[str, Any]) -> tuple[bytes, str]:
        """Return a finished row's image file and its media type. Raises RowError, StorageError."""
        data = self._made(row)
        name = row["file_name"] or row["id"]
        return data, Image.MIME[open_image(data, Limits(), name).format or "PNG"]

    def _made(self, row: dict[str, Any]) -> bytes:
        name = row["file_name"]
        if row.get("image"):
            return self._output.picture(row)
        if not name or not OURS.fullmatch(name):
            raise RowError(ErrorCode.MISSING_FILE, f"{row['id']}: {str(name)[:200]!r} is not a picture of this OUTPUT")
        try:
            if ".tar/" not in name:
                return self._output.picture(row)
            with self._tars:  # only one tar is held open
                return self._output.picture(row)
        except (FileNotFoundError, KeyError):
            raise RowError(ErrorCode.MISSING_FILE, f"{name} is gone from {self._output.root}") from None

    def made_thumbnail(self, row: dict[str, Any]) -> bytes | None:
        """Return a WebP thumbnail of an output; None: the image is missing or damaged."""
        try:
            return thumbnail(self._made(row), MADE_SIDE, Limits())
        except RowError:
            return None

    def source_thumbnail(self, uri: str | None, frame: Frame | None = None) -> bytes | None:
        """Return a WebP thumbnail of a query or context; None: it was inline in the manifest, is missing or
        not allowed.

        frame: for a query, `frame_of` its row; default: the whole image."""
        if uri is None or uri == INLINE or self._in_vain >= PATIENCE:
            return None
        try:
            data = read_bytes({"bytes": None, "path": resolve(uri, self._base)}, self._allow, self._limits, self._storage)
            return thumbnail(data, SOURCE_SIDE, self._limits, frame, self._fit)
        except StorageError:
            self._in_vain += 1
        except ContextDiffusionError:
            pass
        return None


def frame_of(row: dict[str, Any]) -> Frame | None:
    """Return the size at which a row's query is shown: its output's shape. None: the row has no output."""
    if row["status"] != "ok" or not row["width"] or not row["height"]:
        return None
    return _within(SOURCE_SIDE, row["width"], row["height"])


def thumbnail(data: bytes, side: int, limits: Limits, frame: Frame | None = None, fit: Fit = "stretch") -> bytes:
    """Return a WebP thumbnail whose longer side has `side` pixels, or as many as the image has; with a frame,
    resized to it by `fit`. Raises RowError."""

    def size(width: int, height: int) -> Size:
        return frame or _within(side, width, height)

    sink = io.BytesIO()
    Image.fromarray(decode_resized(data, limits, "thumbnail", size, fit)).save(sink, "WEBP", quality=82)
    return sink.getvalue()


def _within(side: int, width: int, height: int) -> Size:
    factor = min(1.0, side / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))
