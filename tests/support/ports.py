"""Ports for servers that cannot be told to take any free one."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack

# Below those that the system gives to outgoing connections (from 32768 on), so that none of Ray's many takes
# one between its
# choice and its use; above Ray's own workers' (10002 to 19999).
RANGE = range(20_000, 32_000)
_CHOOSE = random.Random(os.getpid())  # processes begin elsewhere


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1, all free now: they are held together until the last is found."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            listening = held.enter_context(socket.socket())
            try:
                listening.bind(("127.0.0.1", port := _CHOOSE.choice(RANGE)))
            except OSError:
                continue
            found.append(port)
    return found


def free_port() -> int:
    [port] = free_ports(1)
    return port
