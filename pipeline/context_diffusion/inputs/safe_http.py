"""An HTTP client for untrusted URIs, which checks the address of each connection and the URI of each
redirect.

A check of the row's URI is not enough: its host may resolve to another address when it is connected to, and a
server may redirect to a URI that is not allowed.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from context_diffusion.inputs.url_policy import check_allowed, forbidden, is_public


@dataclass(frozen=True)
class GuardedClient:
    """fsspec's `get_client` for a job's allowed prefixes. Equal clients share their connections."""

    allow: tuple[str, ...]

    async def __call__(self, **options: Any) -> Any:
        import aiohttp

        redirects = aiohttp.TraceConfig()
        redirects.on_request_redirect.append(self._redirect)
        connector = aiohttp.TCPConnector(socket_factory=_public_socket)
        return aiohttp.ClientSession(connector=connector, trace_configs=[redirects], **options)

    async def _redirect(self, session: Any, context: SimpleNamespace, step: Any) -> None:
        """Raise RowError FORBIDDEN_URI for a redirect that is not allowed."""
        from yarl import URL

        response = step.response
        target = response.headers.get("Location") or response.headers.get("URI") or ""
        check_allowed(str(response.url.join(URL(target))), list(self.allow))


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
    """Create a socket for aiohttp. Raises RowError FORBIDDEN_URI if the address is not public."""
    family, kind, protocol, _, target = address
    if not is_public(target[0]):
        raise forbidden(target[0], "the host of a row's URI has this address, which is not public")
    return socket.socket(family, kind, protocol)
