"""Take URIs of files apart: protocol, normal form, folder, relative paths. Opens no file."""

from __future__ import annotations

import os
import re

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def protocol(uri: str) -> str:
    """Return the URI's scheme in lower case; `file` for a plain path."""
    match = SCHEME.match(uri)
    return match[1].lower() if match else "file"


def local_path(uri: str) -> str:
    """Return the absolute path of a file:// URI or a plain path. Nothing is unquoted: a name may hold % or
    #."""
    return os.path.abspath(re.sub(r"^file://(localhost)?(?=/)", "", uri, flags=re.IGNORECASE))


def is_local(uri: str) -> bool:
    """Return whether a URI names a file of this machine."""
    return protocol(uri) in ("file", "local")


def normal(uri: str) -> str:
    """Return the normal form: an absolute path, or a URI with its scheme in lower case, without a trailing
    slash."""
    if is_local(uri):
        return local_path(uri)
    scheme, rest = uri.split("://", 1)
    return f"{scheme.lower()}://{rest}".rstrip("/")


def parent(uri: str) -> str:
    """Return the folder of a URI, in normal form."""
    return normal(uri).rsplit("/", 1)[0]


def resolve(uri: str, base: str) -> str:
    """Resolve a relative URI against the folder `base`; return others unchanged."""
    if SCHEME.match(uri) or uri.startswith("/") or "::" in uri:
        return uri
    return f"{base.rstrip('/')}/{uri}"


def relative(uri: str, base: str) -> str:
    """Return a local file's path relative to the local folder `base`, as the inverse of `resolve`; others
    unchanged.

    The path has `..` parts where the file lies outside of `base`.
    """
    if not is_local(uri) or not is_local(base) or not uri.startswith(("/", "file:")):
        return uri
    path = os.path.relpath(local_path(uri), local_path(base))
    return local_path(uri) if "::" in path else path  # `resolve` reads `::` as a chain of URLs
