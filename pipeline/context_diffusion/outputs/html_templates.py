"""Loads the Jinja templates that lie beside the code that fills them. Values from a row are escaped."""

from __future__ import annotations

import jinja2


def templates(package: str) -> jinja2.Environment:
    """Return an environment of the .j2 files in a package's folder. `tojson` is compact and keeps Unicode."""
    loader = jinja2.PackageLoader(package, ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    json_options = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.policies["json.dumps_kwargs"] = json_options
    return environment
