"""The pictures that the report and the viewer show: made ones, queries, contexts; whole or as thumbnails.

What a row names is untrusted here too: sources are read under the rules of OUTPUT's job, and a file_name leads to
images/ and webdataset/ of OUTPUT alone.
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
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

MADE_SIDE, SOURCE_SIDE = 256, 128  # pixels of a thumbnail's longer side
THREADS = 4  # each may decode a picture of limits.max_pixels
PATIENCE_S, PATIENCE = 5.0, 3  # that a source is waited for, and how many may be in vain before none is looked for
Frame = tuple[int, int]  # width and height at which a picture is shown, cut or padded to them as the job's `fit` says
OURS = re.compile(r"(images/part-\d{5,}|webdataset/part-\d{5,}\.tar)/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class Pictures:
    """Of one OUTPUT. Threads may share it."""

    def __init__(self, output: Output) -> None:
        plan = output.read_json(output.plan)
        job = GenerateJob.model_validate(plan["job"])
        self._output, self._limits = output, job.limits
        # Columns without which a row's picture is not found; a part's pictures are held by one thread at a time.
        self.columns = ["image"] if job.images_in == "parquet" else []
        self.threads = 1 if self.columns else THREADS
        self._fit, self._base = job.fit, output.base()
        self._allow = plan["allow"]
        self._storage = Storage(job.storage_options, deadline_s=PATIENCE_S)
        self._in_vain, self._tars = 0, threading.Lock()

    def made(self, row: dict[str, Any]) -> tuple[bytes, str]:
        """-> a finished row's picture file and its media type. Raises RowError, StorageError."""
        data, name = self._made(row), row["file_name"] or row["id"]
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
            with self._tars:  # one at a time is kept
                return self._output.picture(row)
        except (FileNotFoundError, KeyError):
            raise RowError(ErrorCode.MISSING_FILE, f"{name} is gone from {self._output.root}") from None

    def made_thumbnail(self, row: dict[str, Any]) -> bytes | None:
        """WebP; None where the picture is gone or damaged."""
        try:
            return thumbnail(self._made(row), MADE_SIDE, Limits())
        except RowError:
            return None

    def source_thumbnail(self, uri: str | None, frame: Frame | None = None) -> bytes | None:
        """WebP of a query or context; None where it was inline in the manifest, is gone, or may not be read.

        frame: of a query, `frame_of` its row; left out: the whole picture."""
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
    """How a row's query is shown beside its picture: in its shape, as the engine had it. None where none was made."""
    if row["status"] != "ok" or not row["width"] or not row["height"]:
        return None
    return _within(SOURCE_SIDE, row["width"], row["height"])


def thumbnail(data: bytes, side: int, limits: Limits, frame: Frame | None = None, fit: Fit = "stretch") -> bytes:
    """WebP, its longer side `side` pixels, or as many as the picture has; with a frame, brought to that by `fit`. Raises
    RowError."""

    def size(width: int, height: int) -> Size:
        return frame or _within(side, width, height)

    sink = io.BytesIO()
    Image.fromarray(decode_resized(data, limits, "thumbnail", size, fit)).save(sink, "WEBP", quality=82)
    return sink.getvalue()


def _within(side: int, width: int, height: int) -> Size:
    factor = min(1.0, side / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))
