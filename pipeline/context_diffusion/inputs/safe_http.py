"""HTTP for untrusted rows: what a check of the URI alone cannot see, names that turn to inner addresses and redirects.

A name may have another address when it is connected to than when it was checked, and a server may send one elsewhere: so
each connection's own address is looked at, and each redirect's URI is checked as the row's was.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from context_diffusion.inputs.url_policy import check_allowed, forbidden, is_public


@dataclass(frozen=True)
class GuardedClient:
    """fsspec's `get_client` for the prefixes of a job; equal ones share their connections."""

    allow: tuple[str, ...]

    async def __call__(self, **options: Any) -> Any:
        import aiohttp

        redirects = aiohttp.TraceConfig()
        redirects.on_request_redirect.append(self._redirect)
        connector = aiohttp.TCPConnector(socket_factory=_public_socket)
        return aiohttp.ClientSession(connector=connector, trace_configs=[redirects], **options)

    async def _redirect(self, session: Any, context: SimpleNamespace, step: Any) -> None:
        response = step.response
        target = response.headers.get("Location") or response.headers.get("URI") or ""
        from yarl import URL

        check_allowed(str(response.url.join(URL(target))), list(self.allow))


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
    """aiohttp's `socket_factory`. Raises RowError FORBIDDEN_URI."""
    family, kind, number, _, target = address
    if not is_public(target[0]):
        raise forbidden(target[0], "a row's host has this address, which is not a public one")
    return socket.socket(family, kind, number)
