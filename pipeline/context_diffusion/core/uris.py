"""URIs of files: their protocol, their normal form, their folder; relative ones resolved. Opens nothing."""

from __future__ import annotations

import os
import re

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def protocol(uri: str) -> str:
    """The URI's scheme in lower case; `file` for a plain path."""
    match = SCHEME.match(uri)
    return match[1].lower() if match else "file"


def local_path(uri: str) -> str:
    """The path of a file:// URI or of a plain path, made absolute. Nothing is unquoted: a name may hold % or #."""
    return os.path.abspath(re.sub(r"^file://(localhost)?(?=/)", "", uri, flags=re.IGNORECASE))


def is_local(uri: str) -> bool:
    return protocol(uri) in ("file", "local")


def normal(uri: str) -> str:
    """One spelling: an absolute path, or scheme://... in lower case, without a slash at its end."""
    if is_local(uri):
        return local_path(uri)
    scheme, rest = uri.split("://", 1)
    return f"{scheme.lower()}://{rest}".rstrip("/")


def parent(uri: str) -> str:
    return normal(uri).rsplit("/", 1)[0]


def resolve(uri: str, base: str) -> str:
    """A relative URI against the folder `base`; others as they are."""
    if SCHEME.match(uri) or uri.startswith("/") or "::" in uri:
        return uri
    return f"{base.rstrip('/')}/{uri}"


def relative(uri: str, base: str) -> str:
    """What `resolve` takes back: a local file's path from the local folder `base`, with `..` where it lies outside; others as
    they are."""
    if not is_local(uri) or not is_local(base) or not uri.startswith(("/", "file:")):
        return uri
    path = os.path.relpath(local_path(uri), local_path(base))
    return local_path(uri) if "::" in path else path  # which `resolve` takes for a chain of URLs
