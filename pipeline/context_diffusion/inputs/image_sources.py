"""Reads a manifest's cells as image sources, and the bytes and pixels of a source."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import CONTEXT
from context_diffusion.core.uris import resolve
from context_diffusion.inputs.decode import decode_image
from context_diffusion.inputs.safe_http import GuardedClient
from context_diffusion.inputs.url_policy import check_allowed
from context_diffusion.storage.filesystem import Storage

INLINE = "inline"  # the name in OUTPUT of a source that was bytes in its manifest
ImageSource = dict[str, Any]  # {"bytes": ..., "path": ...}


def as_source(value: Any, base: str) -> ImageSource | None:
    """Convert a URI, bytes or {bytes, path} to {bytes, path}; None if empty. base: of relative URIs."""
    if isinstance(value, bytes):
        value = {"bytes": value}
    if isinstance(value, str):
        value = {"path": value} if value else None
    if not isinstance(value, dict):
        return None
    data, path = value.get("bytes"), value.get("path")
    if data:
        return {"bytes": data, "path": path}
    return {"bytes": None, "path": resolve(str(path), base)} if path else None


def as_sources(value: Any, base: str, column: str = CONTEXT) -> list[ImageSource]:
    """Convert a list, a JSON list (CSV) or a single value to a list of sources. column: for messages. Raises
    RowError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            code = ErrorCode.NO_CONTEXT if column == CONTEXT else ErrorCode.INVALID_SETTING
            raise RowError(code, f"{column} is not a JSON list: {value[:80]!r} ({error})") from None
    items = value if isinstance(value, list) else [value]
    sources = [as_source(item, base) for item in items]
    return [source for source in sources if source is not None]


def read_pixels(
    source: ImageSource, allow: list[str], limits: Limits, storage: Storage, name: str = "inline image"
) -> Pixels:
    """Read a source's pixels at full size.

    allow: URI prefixes that may be read; name: what bytes without a path are called in messages. Raises
    RowError.
    """
    return decode_image(read_bytes(source, allow, limits, storage), limits, source["path"] or name)


def read_bytes(source: ImageSource, allow: list[str], limits: Limits, storage: Storage) -> bytes:
    """Read a source's bytes: its inline bytes, else the file. Raises RowError."""
    if source["bytes"] is not None:
        return bytes(source["bytes"])
    check_allowed(source["path"], allow)
    return storage.read_input(source["path"], limits.max_bytes, GuardedClient(tuple(allow)))


def without_bytes(column: pa.ChunkedArray) -> pa.Array:
    """Drop the bytes of sources whose pixels are loaded."""
    stripped = [
        [{**item, "bytes": None} for item in value]
        if isinstance(value, list)
        else value and {**value, "bytes": None}
        for value in column.to_pylist()
    ]
    return pa.array(stripped, column.type)
