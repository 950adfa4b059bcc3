"""Renders the report as one HTML file that contains its markup, style, script and data, and needs no network.

Texts of manifests are untrusted: Jinja escapes what it inserts, the script sets plain text only, and the
page's Content Security Policy runs no other script.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from markupsafe import Markup

from context_diffusion.outputs.html_templates import templates
from context_diffusion.outputs.report.glossary import glossary
from context_diffusion.outputs.report.job_facts import Facts

SCRIPTS = ("source.js", "tips.js", "gallery.js", "zoom.js", "main.js")


def render(
    summary: dict[str, Any],
    facts: Facts,
    data: dict[str, Any],
    sheets: Markup | None = None,
    connect: str = "'none'",
) -> bytes:
    """Render the page.

    facts: from job_facts.py; data: what source.js reads; sheets: from sweep_grid.py; connect: where the
    script may request rows, as a source of the Content Security Policy.
    """
    environment = templates("context_diffusion.outputs.report")
    assert environment.loader
    script_files = [environment.loader.get_source(environment, name)[0] for name in SCRIPTS]
    script = "\n".join(["'use strict';", *script_files])
    style = environment.loader.get_source(environment, "report.css")[0]
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        facts=facts,
        tips=glossary(),
        data=data,
        sheets=sheets or Markup(),
        script=script,
        style=style,
        script_hash=_script_hash(script),
        connect=connect,
    )
    return page.encode("utf-8", "replace")


def _script_hash(script: str) -> str:
    """Return the hash that allows an inline script in a Content Security Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
