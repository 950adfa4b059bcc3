"""Finds duplicate ids out of core: digests go to files by their first byte, each file is checked alone."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BUCKETS = 64
BUFFERED = 1 << 16  # digests per bucket in memory


class UniqueIds:
    """Collects ids and finds duplicates. Needs 16 bytes of disk per id."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="context-diffusion-ids-")
        self._buckets: list[bytearray] = [bytearray() for _ in range(BUCKETS)]
        self.count = 0

    def __enter__(self) -> UniqueIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, row_id: str) -> None:
        """Add an id."""
        digest = _digest(row_id)
        number = digest[0] % BUCKETS
        self._buckets[number] += digest
        self.count += 1
        if len(self._buckets[number]) >= 16 * BUFFERED:
            self._flush(number)

    def duplicates(self) -> set[bytes]:
        """Return the digests of the ids that were added more than once."""
        duplicates: set[bytes] = set()
        for number in range(BUCKETS):
            path = Path(self._folder.name) / str(number)
            stored = path.read_bytes() if path.exists() else b""
            digests = np.frombuffer(stored + bytes(self._buckets[number]), dtype="S16")
            # S16 strips zero bytes at the end: two different ids are equal with a chance of 2**-64.
            values, counts = np.unique(digests, return_counts=True)
            duplicates.update(bytes(value).ljust(16, b"\0") for value in values[counts > 1])
        return duplicates

    def _flush(self, number: int) -> None:
        with (Path(self._folder.name) / str(number)).open("ab") as file:
            file.write(self._buckets[number])
        self._buckets[number].clear()


def name_duplicates(
    digests: set[bytes], ids: Iterable[tuple[str, str]], most: int = 5
) -> dict[str, list[str]]:
    """Return the first few ids whose digest is among `digests`, each with its first two places.

    ids: all ids with their places, from a second pass over the manifest; most: how many ids are returned.
    """
    places: dict[str, list[str]] = {}
    for row_id, place in ids:
        if _digest(row_id) in digests and (row_id in places or len(places) < most):
            places.setdefault(row_id, []).append(place)
            if len(places) == min(most, len(digests)) and all(
                len(row_places) > 1 for row_places in places.values()
            ):
                break
    return {row_id: row_places[:2] for row_id, row_places in places.items()}


def _digest(row_id: str) -> bytes:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
