"""Figures and rows -> one HTML file: markup, style, script and data in it; nothing in it may call the network.

Texts of manifests are data: Jinja escapes what it sets, the script sets text alone, and the page's policy runs no other.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from markupsafe import Markup

from context_diffusion.outputs.html_templates import templates

SCRIPTS = ("source.js", "gallery.js", "zoom.js", "main.js")


def render(summary: dict[str, Any], data: dict[str, Any], sheets: Markup | None = None, connect: str = "'none'") -> bytes:
    """data: what source.js reads. sheets: outputs/report/sweep_grid.py's. connect: where the script may ask for rows, by the
    Content Security Policy."""
    environment = templates()
    assert environment.loader
    script = "\n".join(["'use strict';", *(environment.loader.get_source(environment, name)[0] for name in SCRIPTS)])
    style = environment.loader.get_source(environment, "report.css")[0]
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        data=data,
        sheets=sheets or Markup(),
        script=script,
        style=style,
        script_hash=_digest(script),
        connect=connect,
    )
    return page.encode("utf-8", "replace")


def _digest(text: str) -> str:
    """As a Content Security Policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
