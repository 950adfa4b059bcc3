"""Caches what the viewer reads from parts: rows by position, thumbnails, and parts that contain images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from itertools import groupby
from typing import Any, TypeVar

import pyarrow as pa
from cachetools import LRUCache

from context_diffusion.core.schema import CONTEXT, QUERY
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.cards import COLUMNS
from context_diffusion.outputs.report.row_sample import Position
from context_diffusion.outputs.report.thumbnails import ImageReader, frame_of

T = TypeVar("T")
CACHED_ROWS = 10_000
THUMBNAIL_BYTES = 64 * 2**20
PART_BYTES = 512 * 2**20
Row = dict[str, Any]


class ViewerCache:
    """The cached rows and images of one OUTPUT. It may be used by several threads."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._images = ImageReader(output, output.read_plan())
        self._rows: LRUCache[Position, Row] = LRUCache(CACHED_ROWS)
        self._thumbnails: LRUCache[Hashable, bytes] = LRUCache(THUMBNAIL_BYTES, len)
        self._parts: LRUCache[int, pa.Table] = LRUCache(PART_BYTES, lambda part: part.nbytes)
        self._lock = threading.Lock()
        self._decoders = threading.Semaphore(self._images.threads)

    def rows(self, positions: list[Position]) -> list[Row]:
        """Return the rows at these positions. Each part is read once at most."""
        missing = sorted({position for position in positions if position not in self._rows})
        read: dict[Position, Row] = {}
        for shard, group in groupby(missing, lambda position: position[0]):
            numbers = [number for _, number in group]
            part = self._output.read_part(shard, COLUMNS).take(numbers).to_pylist()
            read |= {(shard, number): row for number, row in zip(numbers, part, strict=True)}
        with self._lock:
            self._rows.update(read)
            return [read.get(position) or self._rows[position] for position in positions]

    def output_image(self, position: Position) -> tuple[bytes, str]:
        """Return the row's image file and its media type. Raises RowError, StorageError."""
        with self._decoders:
            return self._images.output_image(self._with_image(position))

    def output_thumbnail(self, position: Position) -> bytes | None:
        """Return a thumbnail of the row's image; None if it is missing or damaged."""
        return self._thumbnail(position, lambda: self._images.output_thumbnail(self._with_image(position)))

    def source_thumbnail(self, position: Position, number: int | None) -> bytes | None:
        """Return a thumbnail of the row's context with this number, or of its query if the number is None."""
        [row] = self.rows([position])
        uris = [row[QUERY]] if number is None else (row[CONTEXT] or [])[number : number + 1]
        if not uris:
            return None
        uri = uris[0]
        frame = frame_of(row) if number is None else None
        return self._thumbnail((uri, frame), lambda: self._images.source_thumbnail(uri, frame))

    def _thumbnail(self, key: Hashable, create: Callable[[], bytes | None]) -> bytes | None:
        with self._lock:
            cached = self._thumbnails.get(key)
        if cached is not None:
            return cached
        with self._decoders:
            thumbnail = create()
        return None if thumbnail is None else self._store(self._thumbnails, key, thumbnail)

    def _with_image(self, position: Position) -> Row:
        """Return the row, with its image if images are stored in the parts."""
        [row] = self.rows([position])
        if not self._images.columns or row["status"] != "ok":
            return row
        shard, number = position
        with self._lock:
            part = self._parts.get(shard)
        if part is None:
            part = self._store(self._parts, shard, self._output.read_part(shard, self._images.columns))
        return {**row, "image": part["image"][number].as_py()}

    def _store(self, cache: LRUCache[Any, T], key: Hashable, value: T) -> T:
        """Add a value to a cache, unless it is larger than the cache."""
        with self._lock:
            if cache.getsizeof(value) <= cache.maxsize:
                cache[key] = value
        return value
