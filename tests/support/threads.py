"""Threads that take turns far more often than usual, so that a race of theirs shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OFTEN = 1e-6  # seconds


@contextmanager
def threads_that_switch_often() -> Iterator[None]:
    """Let Python's threads take turns every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(OFTEN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
