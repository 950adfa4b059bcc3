"""Our pages' templates, which stand beside the code that fills them. Whatever a row says is escaped."""

from __future__ import annotations

import jinja2


def templates(package: str) -> jinja2.Environment:
    """Of the .j2 files in a package's folder; `tojson` is compact and keeps letters as they are."""
    loader = jinja2.PackageLoader(package, ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment
