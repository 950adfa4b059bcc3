"""What was made of a picture, by its content: contexts repeat over rows and shards, often under several names."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable
from typing import Any

from cachetools import LRUCache
from numpy.typing import NDArray


class ContentCache:
    """The last arrays, `limit` bytes of them at most; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._arrays: LRUCache[Hashable, NDArray[Any]] = LRUCache(limit, getsizeof=lambda array: array.nbytes)
        self._lock = threading.Lock()

    def get(self, data: bytes, wanted: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What `make` made of these bytes the last time, or makes now. wanted: all else that it depends on."""
        key = (hashlib.blake2b(data, digest_size=16).digest(), wanted)
        with self._lock:
            if (array := self._arrays.get(key)) is not None:
                return array
        array = make()
        with self._lock:
            if array.nbytes <= self._arrays.maxsize:
                self._arrays[key] = array
        return array
