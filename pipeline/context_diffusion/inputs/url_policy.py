"""Which URIs a row may read. Manifests are untrusted: only prefixes that the job allows, no tricks to leave them."""

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
    """Return the URI prefixes that rows may read: the job's `allow`, else the folders of its manifest files."""
    return allow or list(dict.fromkeys(parent(uri) for uri in manifests))


def check_allowed(uri: str, allow: list[str]) -> None:
    """Raises RowError FORBIDDEN_URI, naming the rule, unless the URI lies under one of the prefixes.

    Local paths are compared after resolving `..` and symbolic links; remote ones may hold no `..` at all.
    """
    if "::" in uri or "\0" in uri:
        raise forbidden(uri, "chained and templating URLs are not read")
    if protocol(uri) not in PROTOCOLS:
        raise forbidden(uri, f"the protocol {protocol(uri)}:// is not among {', '.join(sorted(PROTOCOLS))}")
    if is_local(uri):
        path = os.path.realpath(local_path(uri))
        prefixes = [os.path.realpath(local_path(prefix)) for prefix in allow if is_local(prefix)]
    else:
        rest = uri.split("://", 1)[1]
        rest = unquote(rest) if protocol(uri).startswith("http") else rest
        if "\\" in rest or re.search(r"(^|/)\.\.?(/|$)", rest):
            raise forbidden(uri, "`..` and backslashes are not read")
        path = _canonical(uri)
        prefixes = [_canonical(prefix) for prefix in allow if not is_local(prefix)]
    if not any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes):
        listed = ", ".join(allow if len(allow) <= 3 else ["...", allow[-1]])
        hint = f"add its folder to the job, `allow: [{listed}, {parent(uri)}]`, then run again with --retry-failed"
        raise forbidden(uri, f"it lies outside of {', '.join(allow)}; {hint}")
    if protocol(uri) in ("http", "https"):
        _check_host(uri)


def forbidden(uri: str, rule: str) -> RowError:
    """The error of a URI that a rule forbids."""
    return RowError(ErrorCode.FORBIDDEN_URI, f"{uri[:200]}: {rule}")


def _canonical(uri: str) -> str:
    scheme, rest = normal(uri).split("://", 1)
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower() if scheme.lower().startswith('http') else host}{slash}{path}"


def _check_host(uri: str) -> None:
    """No loopback, private, link-local or metadata addresses: the cluster's own network is not for rows."""
    host = urlsplit(uri).hostname or ""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise RowError(ErrorCode.MISSING_FILE, f"{uri[:200]}: the host {host!r} has no address") from None
    for address in addresses:
        if not is_public(str(address)):
            raise forbidden(uri, f"{host} has the address {address}, which is not a public one")


def is_public(address: str) -> bool:
    """No loopback, private, link-local, shared, multicast or reserved one, nor one of those inside an IPv6 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if isinstance(found, ipaddress.IPv6Address) and found in NAT64:
        inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))
