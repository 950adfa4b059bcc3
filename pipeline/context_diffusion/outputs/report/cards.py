"""Converts a row of data/ to the plain JSON that the page's script shows. Long texts are cut."""

from __future__ import annotations

import math
import shlex
from datetime import datetime
from typing import Any

from context_diffusion.core.schema import (
    CONTEXT,
    ID,
    NEGATIVE_PROMPT,
    PROMPT,
    QUERY,
    SCORE_COLUMNS,
    SETTING_TYPES,
)
from context_diffusion.core.settings import Settings
from context_diffusion.engine.guidance import words_lead
from context_diffusion.outputs.report.thumbnails import OUTPUT_FILE

CONTEXTS = 8  # contexts of a row that are shown, at most
MAX_CHARACTERS = {"error_message": 500, PROMPT: 1000, NEGATIVE_PROMPT: 300, "full_prompt": 1000}
URI_CHARACTERS = 200
WORDS, WORD_CHARACTERS = 12, 30  # of a prompt's words without an effect
GUIDANCE = ("guidance_scale", "context_guidance_scale")
FIELDS = (ID, "index", "status", "error_code", "width", "height", "seconds")
DETAILS = (
    *SETTING_TYPES, "control", "fit", "model", "device", "compiled", "chunk", "lanes", "prompt_truncated",
    "created_at",
)  # fmt: skip
COLUMNS = [
    *FIELDS, *MAX_CHARACTERS, "unknown_words", "file_name", QUERY, CONTEXT, *DETAILS, *SCORE_COLUMNS,
]  # fmt: skip


def card(row: dict[str, Any], full_image: str | None, root: str) -> dict[str, Any]:
    """Return what the page shows of a row, without thumbnails.

    full_image: the URL of the row's image file; root: of OUTPUT.
    """
    contexts = row.get(CONTEXT) or []
    return {
        **{name: _to_json(row.get(name)) for name in FIELDS},
        **{name: _cut(row.get(name), longest) for name, longest in MAX_CHARACTERS.items()},
        "settings": {name: _to_json(row[name]) for name in DETAILS if row.get(name) is not None},
        "scores": {name: _to_json(row[name]) for name in SCORE_COLUMNS if row.get(name) is not None},
        QUERY: {"uri": _cut(row.get(QUERY), URI_CHARACTERS), "thumbnail": None},
        CONTEXT: [{"uri": _cut(uri, URI_CHARACTERS), "thumbnail": None} for uri in contexts[:CONTEXTS]],
        "more_contexts": max(0, len(contexts) - CONTEXTS),
        "unknown_words": [_cut(word, WORD_CHARACTERS) for word in (row.get("unknown_words") or [])[:WORDS]],
        "thumbnail": None,
        "full_image": full_image,
        "prompt_leads": _prompt_leads(row),
        "reproduce": _reproduce_command(row, root),
    }


def has_own_file(name: str | None) -> bool:
    """Return whether a row's image is a file, not a member of a tar or a cell of a part."""
    return bool(name and OUTPUT_FILE.fullmatch(name) and ".tar/" not in name)


def _prompt_leads(row: dict[str, Any]) -> bool:
    """Return whether a finished row's prompt goes before its contexts."""
    if row["status"] != "ok" or not row.get(PROMPT) or not row.get(CONTEXT):
        return False
    scales = {name: row[name] for name in GUIDANCE if row.get(name) is not None}
    return words_lead(Settings(**scales))


def _reproduce_command(row: dict[str, Any], root: str) -> str | None:
    name = row["file_name"]
    file = shlex.quote(f"{root}/{name}")
    return f"context-diffusion reproduce {file}" if has_own_file(name) else None


def _cut(text: str | None, longest: int) -> str | None:
    return text if text is None or len(text) <= longest else text[: longest - 1] + "…"


def _to_json(value: Any) -> Any:
    """Convert a value to JSON: floats with six digits, about the precision of 32 bits, and times as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
