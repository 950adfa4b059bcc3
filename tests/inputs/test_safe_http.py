"""Real HTTP servers on loopback addresses, one of which stands for a public one: redirects and names that change."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.inputs import safe_http
from context_diffusion.inputs import url_policy as allow_module
from context_diffusion.inputs.image_sources import read_bytes
from context_diffusion.inputs.url_policy import is_public
from context_diffusion.storage.filesystem import Storage

PUBLIC, INNER = "127.0.0.2", "127.0.0.1"
STORAGE = Storage(deadline_s=2)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        place = self.server.redirects.get(self.path)  # type: ignore[attr-defined]
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(302 if place else 200)
        if place:
            self.send_header("Location", place)
        data = b"" if place else b"the bytes"
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    started = {}
    for address in (PUBLIC, INNER):
        server = ThreadingHTTPServer((address, 0), Handler)
        server.redirects, server.asked = {}, []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started[address] = server
    for module in (allow_module, safe_http):
        monkeypatch.setattr(module, "is_public", lambda address: address == PUBLIC)
    yield started
    for server in started.values():
        server.shutdown()
        server.server_close()


def url(server: Any, path: str, host: str | None = None) -> str:
    return f"http://{host or server.server_address[0]}:{server.server_address[1]}{path}"


def read(uri: str, *prefixes: str) -> bytes:
    return read_bytes({"bytes": None, "path": uri}, list(prefixes), Limits(), STORAGE)


def test_a_public_server_is_read_and_its_redirects_within_what_is_allowed(servers: dict[str, Any]) -> None:
    server = servers[PUBLIC]
    server.redirects["/pictures/old.png"] = "/pictures/new.png"
    assert read(url(server, "/pictures/a.png"), url(server, "/pictures")) == b"the bytes"
    assert read(url(server, "/pictures/old.png"), url(server, "/pictures")) == b"the bytes"


def test_redirects_to_the_inside_or_out_of_what_is_allowed_are_refused(servers: dict[str, Any]) -> None:
    server, inner = servers[PUBLIC], servers[INNER]
    server.redirects["/pictures/a.png"] = url(inner, "/secret")
    server.redirects["/pictures/b.png"] = "/elsewhere/b.png"
    for path, prefixes in (("a", [url(server, "/pictures"), url(inner, "/")]), ("b", [url(server, "/pictures")])):
        with pytest.raises(RowError) as found:
            read(url(server, f"/pictures/{path}.png"), *prefixes)
        assert found.value.code == ErrorCode.FORBIDDEN_URI
    assert inner.asked == []
    assert "/elsewhere/b.png" not in server.asked


def test_a_name_that_turns_to_an_inner_address_after_the_check_is_refused(
    servers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, real, answers = servers[INNER], socket.getaddrinfo, [PUBLIC]

    def turning(host: Any, *more: Any, **options: Any) -> Any:
        named = host in ("pictures.example", b"pictures.example")
        return real((answers.pop() if answers else INNER) if named else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", turning)
    uri = url(inner, "/a.png", "pictures.example")
    with pytest.raises(RowError) as found:
        read(uri, uri)
    assert found.value.code == ErrorCode.FORBIDDEN_URI
    assert answers == []
    assert inner.asked == []


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1",
     "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"],
)  # fmt: skip
def test_inner_addresses_are_known_in_every_dress(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)
