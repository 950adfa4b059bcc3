"""Encoded prompts, contexts and control maps by content: what repeats over rows is encoded once."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Cache:
    """The least recently used go first when all together are larger than `limit` bytes.

    May be used from several threads. misses and hits: by kind, the part of a key before the colon.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it where it is missing, once however many threads ask for it."""
        with self._lock:
            if key in self._values:
                return self._hit(key)
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._hit(key)
                self.misses[_kind(key)] += 1
            try:
                value = make()
                self._keep(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _hit(self, key: str) -> Any:
        self.hits[_kind(key)] += 1
        self._values.move_to_end(key)
        return self._values[key][0]

    def _keep(self, key: str, value: Any) -> None:
        with self._lock:
            if key in self._values:  # computed again, after a thread's failure let two others begin
                self.size -= self._values.pop(key)[1]
            self._values[key] = value, size_of(value)
            self.size += self._values[key][1]
            while self.size > self.limit and len(self._values) > 1:
                self.size -= self._values.popitem(last=False)[1][1]


def _kind(key: str) -> str:
    return key.partition(":")[0]


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    )
    return sum(size_of(part) for part in parts)
