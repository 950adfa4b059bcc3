"""What the viewer reads of parts and keeps: rows by their place, thumbnails, parts with pictures in them. Threads share it."""

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
from context_diffusion.outputs.report.row_sample import Place
from context_diffusion.outputs.report.thumbnails import MADE_SIDE, Pictures, frame_of

T = TypeVar("T")
ROWS, THUMBNAIL_BYTES, PART_BYTES = 10_000, 64 * 2**20, 512 * 2**20  # kept
Row = dict[str, Any]


class Shelf:
    """Of one OUTPUT."""

    def __init__(self, output: Output) -> None:
        self._output, self._pictures = output, Pictures(output)
        self._rows: LRUCache[Place, Row] = LRUCache(ROWS)
        self._thumbnails: LRUCache[Hashable, bytes] = LRUCache(THUMBNAIL_BYTES, len)
        self._parts: LRUCache[int, pa.Table] = LRUCache(PART_BYTES, lambda part: part.nbytes)
        self._keeping, self._decoding = threading.Lock(), threading.Semaphore(self._pictures.threads)

    def rows(self, places: list[Place]) -> list[Row]:
        """In the order that was asked for; of each part one read."""
        missing = sorted({place for place in places if place not in self._rows})
        read: dict[Place, Row] = {}
        for shard, some in groupby(missing, lambda place: place[0]):
            numbers = [number for _, number in some]
            part = self._output.read_part(shard, COLUMNS).take(numbers).to_pylist()
            read |= {(shard, number): row for number, row in zip(numbers, part, strict=True)}
        with self._keeping:
            self._rows.update(read)
            return [read.get(place) or self._rows[place] for place in places]

    def made(self, place: Place) -> tuple[bytes, str]:
        """-> the picture file and its media type. Raises RowError, StorageError."""
        with self._decoding:
            return self._pictures.made(self._with_picture(place))

    def made_thumbnail(self, place: Place) -> bytes | None:
        return self._thumbnail((place, MADE_SIDE), lambda: self._pictures.made_thumbnail(self._with_picture(place)))

    def source_thumbnail(self, place: Place, number: int | None) -> bytes | None:
        """number: of the context; None: the query."""
        [row] = self.rows([place])
        uris = [row[QUERY]] if number is None else (row[CONTEXT] or [])[number : number + 1]
        if not uris:
            return None
        shown = uris[0], frame_of(row) if number is None else None
        return self._thumbnail(shown, lambda: self._pictures.source_thumbnail(*shown))

    def _thumbnail(self, key: Hashable, make: Callable[[], bytes | None]) -> bytes | None:
        with self._keeping:
            if (known := self._thumbnails.get(key)) is not None:
                return known
        with self._decoding:
            made = make()
        return None if made is None else self._keep(self._thumbnails, key, made)

    def _with_picture(self, place: Place) -> Row:
        [row] = self.rows([place])
        if not self._pictures.columns or row["status"] != "ok":
            return row
        shard, number = place
        with self._keeping:
            part = self._parts.get(shard)
        if part is None:
            part = self._keep(self._parts, shard, self._output.read_part(shard, self._pictures.columns))
        return {**row, "image": part["image"][number].as_py()}

    def _keep(self, kept: LRUCache[Any, T], key: Hashable, value: T) -> T:
        with self._keeping:
            if kept.getsizeof(value) <= kept.maxsize:
                kept[key] = value
        return value
