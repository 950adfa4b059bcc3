"""Decides which URIs a row may read. Manifests are untrusted: only prefixes that the job allows are read."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.uris import is_local, local_path, normal, parent, protocol

NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last four bytes
PROTOCOLS = {"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "hf", "memory"}


def allowed_prefixes(allow: list[str], manifests: Iterable[str]) -> list[str]:
    """Return the URI prefixes that rows may read: the job's `allow`, else the folders of its manifests."""
    return allow or list(dict.fromkeys(parent(uri) for uri in manifests))


def check_allowed(uri: str, allow: list[str]) -> None:
    """Raise RowError FORBIDDEN_URI with the violated rule unless the URI is below one of the prefixes.

    Local paths are compared after `..` and symbolic links are resolved; remote URIs must not contain `..`.
    """
    if "::" in uri or "\0" in uri:
        raise forbidden(uri, "chained URLs (`::`) and null bytes are not allowed")
    if protocol(uri) not in PROTOCOLS:
        raise forbidden(uri, f"the protocol {protocol(uri)}:// is not one of {', '.join(sorted(PROTOCOLS))}")
    if is_local(uri):
        path = os.path.realpath(local_path(uri))
        prefixes = [os.path.realpath(local_path(prefix)) for prefix in allow if is_local(prefix)]
    else:
        rest = uri.split("://", 1)[1]
        rest = unquote(rest) if protocol(uri).startswith("http") else rest
        if "\\" in rest or re.search(r"(^|/)\.\.?(/|$)", rest):
            raise forbidden(uri, "`.`, `..` and backslashes are not allowed in paths")
        path = _canonical(uri)
        prefixes = [_canonical(prefix) for prefix in allow if not is_local(prefix)]
    if not any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes):
        listed = ", ".join(allow if len(allow) <= 3 else ["...", allow[-1]])
        hint = f"add its folder to the job, `allow: [{listed}, {parent(uri)}]`, and rerun with --retry-failed"
        raise forbidden(uri, f"it is not below {', '.join(allow)}; {hint}")
    if protocol(uri) in ("http", "https"):
        _check_host(uri)


def forbidden(uri: str, rule: str) -> RowError:
    """Return the error of a URI that a rule forbids."""
    return RowError(ErrorCode.FORBIDDEN_URI, f"{uri[:200]}: {rule}")


def _canonical(uri: str) -> str:
    """Return a remote URI with its scheme, and the host of HTTP, in lower case."""
    scheme, rest = normal(uri).split("://", 1)
    scheme = scheme.lower()
    host, slash, path = rest.partition("/")
    host = host.lower() if scheme.startswith("http") else host
    return f"{scheme}://{host}{slash}{path}"


def _check_host(uri: str) -> None:
    """Raise RowError if the host has no address, or one that is not public (the cluster's own network)."""
    host = urlsplit(uri).hostname or ""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise RowError(ErrorCode.MISSING_FILE, f"{uri[:200]}: the host {host!r} has no address") from None
    for address in addresses:
        if not is_public(str(address)):
            raise forbidden(uri, f"{host} has the address {address}, which is not public")


def is_public(address: str) -> bool:
    """Return whether an address is public: not loopback, private, link-local, shared, multicast or reserved.

    The IPv4 address inside an IPv6 address must be public, too.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    embedded = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed in NAT64:
        embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.is_global and not parsed.is_multicast and (embedded is None or is_public(str(embedded)))
