"""Encoded prompts, contexts and control maps by content: what repeats over rows is encoded once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Cache:
    """The least recently used go first when all together are larger than `limit` bytes.

    misses and hits: by kind, the part of a key before the colon.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self._values: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        kind = key.partition(":")[0]
        if key in self._values:
            self.hits[kind] += 1
            self._values.move_to_end(key)
            return self._values[key][0]
        self.misses[kind] += 1
        value = make()
        self._values[key] = value, size_of(value)
        self.size += self._values[key][1]
        while self.size > self.limit and len(self._values) > 1:
            self.size -= self._values.popitem(last=False)[1][1]
        return value


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts: Iterable[Any] = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    )
    return sum(size_of(part) for part in parts)
