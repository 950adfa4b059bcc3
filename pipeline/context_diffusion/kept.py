"""Decoded pictures by the content of their files: contexts repeat over rows and shards, often under several names."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable

from cachetools import LRUCache

from context_diffusion.schema import Pixels


class Kept:
    """The last pictures, `limit` bytes of them at most; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._pictures: LRUCache[Hashable, Pixels] = LRUCache(limit, getsizeof=lambda pixels: pixels.nbytes)
        self._lock = threading.Lock()

    def get(self, data: bytes, wanted: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """What `make` made of these bytes the last time, or makes now. wanted: all else that the pixels depend on."""
        key = (hashlib.blake2b(data, digest_size=16).digest(), wanted)
        with self._lock:
            if (pixels := self._pictures.get(key)) is not None:
                return pixels
        pixels = make()
        with self._lock:
            if pixels.nbytes <= self._pictures.maxsize:
                self._pictures[key] = pixels
        return pixels
