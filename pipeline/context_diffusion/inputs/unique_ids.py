"""Are all ids different? Out of core: digests go to files by their first byte, each file is checked alone."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BUCKETS = 64
BUFFERED = 1 << 16  # digests a bucket in memory


class UniqueIds:
    """Takes ids; `duplicates` says how many stand more than once, by digest. 16 bytes an id on disk."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="context-diffusion-ids-")
        self._buckets: list[bytearray] = [bytearray() for _ in range(BUCKETS)]
        self.count = 0

    def __enter__(self) -> UniqueIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, row_id: str) -> None:
        digest = _digest(row_id)
        bucket = self._buckets[digest[0] % BUCKETS]
        bucket += digest
        self.count += 1
        if len(bucket) >= 16 * BUFFERED:
            self._flush(digest[0] % BUCKETS)

    def duplicates(self) -> set[bytes]:
        """The digests that came more than once."""
        found: set[bytes] = set()
        for number in range(BUCKETS):
            path = Path(self._folder.name) / str(number)
            stored = path.read_bytes() if path.exists() else b""
            digests = np.frombuffer(stored + bytes(self._buckets[number]), dtype="S16")
            # S16 strips zero bytes at the end, which leaves a one in 2**64 chance to call two different ids equal.
            values, counts = np.unique(digests, return_counts=True)
            found.update(bytes(value).ljust(16, b"\0") for value in values[counts > 1])
        return found

    def _flush(self, number: int) -> None:
        with (Path(self._folder.name) / str(number)).open("ab") as file:
            file.write(self._buckets[number])
        self._buckets[number].clear()


def name_duplicates(digests: set[bytes], ids: Iterable[tuple[str, str]], most: int = 5) -> dict[str, list[str]]:
    """The first few ids whose digest is among `digests`, each with the first two places where it stands: a second pass over the
    manifest, for the message. ids: with their places."""
    places: dict[str, list[str]] = {}
    for row_id, place in ids:
        if _digest(row_id) in digests and (row_id in places or len(places) < most):
            places.setdefault(row_id, []).append(place)
            if len(places) == min(most, len(digests)) and all(len(found) > 1 for found in places.values()):
                break
    return {row_id: found[:2] for row_id, found in places.items()}


def _digest(row_id: str) -> bytes:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
