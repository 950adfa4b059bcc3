"""The environment of the HTML templates of outputs/report. Whatever a row says is escaped."""

from __future__ import annotations

import jinja2


def templates() -> jinja2.Environment:
    """Load the .j2 files of outputs/report; `tojson` is compact and keeps letters as they are."""
    loader = jinja2.PackageLoader("context_diffusion.outputs.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment
