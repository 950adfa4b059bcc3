"""A row of data/ -> what the page's script shows of it: plain JSON, long texts cut."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any
from urllib.parse import quote

from context_diffusion.core.schema import (
    CONTEXT,
    ID,
    NEGATIVE_PROMPT,
    PROMPT,
    QUERY,
    SCORE_COLUMNS,
    SETTING_TYPES,
)

CONTEXTS = 8  # of a row's contexts so many are shown
LONGEST = {"error_message": 500, PROMPT: 1000, NEGATIVE_PROMPT: 300}  # characters
URI_CHARACTERS = 200
PLAIN = (ID, "index", "status", "error_code", "width", "height", "seconds")
TOLD = (*SETTING_TYPES, "control", "fit", "model", "device", "lanes", "prompt_truncated", "created_at")
COLUMNS = [*PLAIN, *LONGEST, "file_name", QUERY, CONTEXT, *TOLD, *SCORE_COLUMNS]


def card(row: dict[str, Any], whole: str | None) -> dict[str, Any]:
    """Without its pictures but `whole`, the URL of the made one: add_pictures fills in thumbnails."""
    contexts = row.get(CONTEXT) or []
    return {
        **{name: _plain(row.get(name)) for name in PLAIN},
        **{name: _cut(row.get(name), longest) for name, longest in LONGEST.items()},
        "settings": {name: _plain(row[name]) for name in TOLD if row.get(name) is not None},
        "scores": {name: _plain(row[name]) for name in SCORE_COLUMNS if row.get(name) is not None},
        QUERY: {"uri": _cut(row.get(QUERY), URI_CHARACTERS), "picture": None},
        CONTEXT: [{"uri": _cut(uri, URI_CHARACTERS), "picture": None} for uri in contexts[:CONTEXTS]],
        "more_contexts": max(0, len(contexts) - CONTEXTS),
        "made": None,
        "whole": whole,
    }


def relative_url(file_name: str) -> str:
    return quote(file_name, safe="/")


def _cut(text: str | None, longest: int) -> str | None:
    return text if text is None or len(text) <= longest else text[: longest - 1] + "…"


def _plain(value: Any) -> Any:
    """What JSON can hold: floats in six digits, which is about what 32 bits hold, times as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
