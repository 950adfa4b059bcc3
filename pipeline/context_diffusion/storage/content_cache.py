"""Caches arrays by the hash of the image that they were computed from.

Context images repeat over rows and shards, often under several names.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable
from typing import Any

from cachetools import LRUCache
from numpy.typing import NDArray


class ContentCache:
    """Caches the last used arrays, at most max_bytes of them. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._arrays: LRUCache[Hashable, NDArray[Any]] = LRUCache(
            max_bytes, getsizeof=lambda array: array.nbytes
        )
        self._lock = threading.Lock()

    def get(self, data: bytes, variant: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the cached array of these bytes, or call `make` and cache its result.

        variant: everything else that the array depends on.
        """
        key = (hashlib.blake2b(data, digest_size=16).digest(), variant)
        with self._lock:
            array = self._arrays.get(key)
        if array is not None:
            return array
        array = make()
        with self._lock:
            if array.nbytes <= self._arrays.maxsize:
                self._arrays[key] = array
        return array
