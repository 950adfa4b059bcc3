"""Real HTTP servers on loopback addresses, one of which stands for a public one: redirects and names that
change."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.inputs import safe_http
from context_diffusion.inputs import url_policy as allow_module
from context_diffusion.inputs.image_sources import read_bytes
from context_diffusion.inputs.url_policy import is_public
from context_diffusion.storage.filesystem import Storage
from support.http_server import Answer, serving

PUBLIC, INNER = "127.0.0.2", "127.0.0.1"
STORAGE = Storage(deadline_s=2)


@dataclass
class Server:
    """address: http://HOST:PORT; redirects: by path; asked: the paths of its requests."""

    address: str = ""
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, _method: str, path: str) -> Answer:
        self.asked.append(path)
        place = self.redirects.get(path)
        return (302, {"Location": place}, b"") if place else (200, {}, b"the bytes")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Server]]:
    for module in (allow_module, safe_http):
        monkeypatch.setattr(module, "is_public", lambda address: address == PUBLIC)
    started = {PUBLIC: Server(), INNER: Server()}
    with ExitStack() as stack:
        for host, server in started.items():
            server.address = stack.enter_context(serving(server.answer, host))
        yield started


def url(server: Server, path: str, host: str | None = None) -> str:
    place = urlsplit(server.address)
    return f"http://{host or place.hostname}:{place.port}{path}"


def read(uri: str, *prefixes: str) -> bytes:
    return read_bytes({"bytes": None, "path": uri}, list(prefixes), Limits(), STORAGE)


def test_a_public_server_is_read_and_its_redirects_within_what_is_allowed(servers: dict[str, Server]) -> None:
    server = servers[PUBLIC]
    server.redirects["/pictures/old.png"] = "/pictures/new.png"
    assert read(url(server, "/pictures/a.png"), url(server, "/pictures")) == b"the bytes"
    assert read(url(server, "/pictures/old.png"), url(server, "/pictures")) == b"the bytes"


def test_redirects_to_the_inside_or_out_of_what_is_allowed_are_refused(servers: dict[str, Server]) -> None:
    server, inner = servers[PUBLIC], servers[INNER]
    server.redirects["/pictures/a.png"] = url(inner, "/secret")
    server.redirects["/pictures/b.png"] = "/elsewhere/b.png"
    for path, prefixes in (
        ("a", [url(server, "/pictures"), url(inner, "/")]),
        ("b", [url(server, "/pictures")]),
    ):
        with pytest.raises(RowError) as found:
            read(url(server, f"/pictures/{path}.png"), *prefixes)
        assert found.value.code == ErrorCode.FORBIDDEN_URI
    assert inner.asked == []
    assert "/elsewhere/b.png" not in server.asked


def test_a_name_that_turns_to_an_inner_address_after_the_check_is_refused(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch
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
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%eth0", "fd00::1",
     "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"],
)  # fmt: skip
def test_inner_addresses_are_known_in_every_dress(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)
