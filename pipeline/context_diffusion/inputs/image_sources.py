"""Sources of pictures: what a manifest's cell names, and the pixels behind it."""

from __future__ import annotations

import json
from typing import Any

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Pixels
from context_diffusion.core.uris import resolve
from context_diffusion.inputs.decode import decode_image
from context_diffusion.inputs.safe_http import GuardedClient
from context_diffusion.inputs.url_policy import check_allowed
from context_diffusion.storage.filesystem import Storage

INLINE = "inline"  # how OUTPUT names a source that was bytes in its manifest
ImageSource = dict[str, Any]  # {"bytes": ..., "path": ...}


def as_source(value: Any, base: str) -> ImageSource | None:
    """A URI, bytes, or {bytes, path} -> {bytes, path}; None where it is empty. base: the folder of relative URIs."""
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


def as_sources(value: Any, base: str) -> list[ImageSource]:
    """A list of sources, as a list, a JSON list (CSV), or one alone."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(ErrorCode.NO_CONTEXT, f"context is not a JSON list: {value[:80]!r} ({error})") from None
    listed = value if isinstance(value, list) else [value]
    return [source for item in listed if (source := as_source(item, base)) is not None]


def read_pixels(source: ImageSource, allow: list[str], limits: Limits, storage: Storage, name: str = "inline image") -> Pixels:
    """The picture as it is. allow: URI prefixes; name: what bytes without a path are called. Raises RowError."""
    return decode_image(read_bytes(source, allow, limits, storage), limits, source["path"] or name)


def read_bytes(source: ImageSource, allow: list[str], limits: Limits, storage: Storage) -> bytes:
    """Those of the file, or those that the row brings. Raises RowError."""
    if source["bytes"] is not None:
        return bytes(source["bytes"])
    check_allowed(source["path"], allow)
    return storage.read_input(source["path"], limits.max_bytes, GuardedClient(tuple(allow)))
