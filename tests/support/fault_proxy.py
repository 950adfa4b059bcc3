"""A proxy before an object store that breaks a share of the requests, each kind at its own rate, by seed.

Each request gets a connection of its own to the store; the Host header stays, so that signatures hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request "
    b"rate.</Message></Error>"
)
HEAD_BYTES = 2**16
READS = ("GET",)
WRITES = ("PUT", "POST", "DELETE")


@dataclass
class Rates:
    """Shares of the requests. reset: before the store hears of it; slow_down: a 503; truncated: of reads,
    half of the body and then the end; lost: of writes, done, but the answer never comes; delay_s: before each
    answer; away: the store does not answer at all, as long as it is set."""

    reset: float = 0.0
    slow_down: float = 0.0
    truncated: float = 0.0
    lost: float = 0.0
    delay_s: float = 0.0
    away: bool = False


@dataclass
class FaultProxy:
    """`with FaultProxy(port_of_the_store, rates, seed) as proxy: proxy.endpoint`. done: how often each fault
    came."""

    upstream: int
    rates: Rates = field(default_factory=Rates)
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Self:
        self._random, ready = random.Random(self.seed), threading.Event()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            self._stopped = asyncio.Event()
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_BYTES)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._stopped.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _fault(self, method: str) -> str:
        rates, drawn = self.rates, self._random.random()
        given = {"reset": rates.reset, "slow_down": rates.slow_down}
        given |= (
            {"truncated": rates.truncated}
            if method in READS
            else {"lost": rates.lost}
            if method in WRITES
            else {}
        )
        for name, rate in given.items():
            if drawn < rate:
                return name
            drawn -= rate
        return "none"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, then the connection ends."""
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines[1:] if b": " in line)
        if b"expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get(b"content-length", 0)))
        while self.rates.away:
            await asyncio.sleep(0.05)
        await asyncio.sleep(self.rates.delay_s)
        fault = self._fault(lines[0].split()[0].decode())
        self.done[fault] += 1
        if fault == "reset":
            writer.transport.abort()
            return
        if fault == "slow_down":
            writer.write(
                b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(SLOW_DOWN)
                + SLOW_DOWN
            )
            return
        kept = [line for line in lines if not line.lower().startswith((b"expect:", b"connection:"))]
        answer = await self._ask(b"\r\n".join([kept[0], b"Connection: close", *kept[1:]]) + body)
        if fault == "lost":
            writer.transport.abort()
            return
        head, _, content = answer.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n" + (content[: len(content) // 2] if fault == "truncated" else content))
        await writer.drain()

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        writer.write(request)
        answer = await reader.read(-1)
        writer.close()
        return answer
