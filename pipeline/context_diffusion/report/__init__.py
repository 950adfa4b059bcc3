"""summary.json and report.html: the figures, the pictures beside their queries and contexts, the failures."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import jinja2
import pyarrow as pa
from PIL import Image

from context_diffusion.closing import close
from context_diffusion.config import Limits
from context_diffusion.errors import ContextDiffusionError
from context_diffusion.images import decode_image
from context_diffusion.output import Output
from context_diffusion.report.sheet import contact_sheets
from context_diffusion.schema import CONTEXT, ID, PROMPT, QUERY

SHOWN, THUMBNAIL = 120, 160  # rows on the page; pixels
COLUMNS = [
    ID, "index", "status", "error_code", "error_message", "file_name", QUERY, CONTEXT, PROMPT, "seed", "scheduler",
    "num_inference_steps", "guidance_scale", "context_guidance_scale", "layout_score", "style_score", "seconds",
]  # fmt: skip


def rebuild(output: Output) -> dict[str, Any]:
    """Counts again and writes summary.json and report.html; what only the run knew is kept."""
    counts = output.count()
    summary = output.read_json(output.summary) if output.storage.exists(output.summary) else {}
    summary |= {"output": output.root, **vars(counts)}
    output.storage.replace(output.summary, json.dumps(summary, indent=2).encode())
    write_report(output, summary)
    if output.storage.exists(output.success):
        close(output)  # the checksums of the two files changed
    return summary


def write_report(output: Output, summary: dict[str, Any]) -> None:
    """One file that opens from disk without a network: thumbnails lie in it, everything is escaped."""
    rows = _even_sample(output, summary["images"] + sum(summary["codes"].values()))
    thumbnails = _Thumbnails(output)
    made = [_card(row, thumbnails, output) for row in rows if row["status"] == "ok"]
    failed = [row for row in rows if row["status"] == "failed"]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("context_diffusion.report", "."), autoescape=True)
    sheets = contact_sheets(output, lambda row: thumbnails.of_bytes(output.picture(row)), thumbnails.of_file)
    page = environment.get_template("report.html.j2").render(
        summary=summary, sheets=sheets, made=made, failed=failed, shown=SHOWN
    )
    output.storage.replace(output.report, page.encode())


def _even_sample(output: Output, total: int) -> list[dict[str, Any]]:
    """Up to SHOWN rows, evenly over the output, and every failed row up to as many."""
    step, seen, rows, failures = max(1, -(-total // SHOWN)), 0, [], 0
    for _, part in output.read_parts():
        present = [name for name in COLUMNS if name in part.column_names]
        table: pa.Table = part.select([*present, *(["image"] if "image" in part.column_names else [])])
        for row in table.to_pylist():
            failures += row["status"] == "failed"
            if seen % step == 0 or (row["status"] == "failed" and failures <= SHOWN):
                rows.append(row)
            seen += 1
    return rows


def _card(row: dict[str, Any], thumbnails: _Thumbnails, output: Output) -> dict[str, Any]:
    made = thumbnails.of_bytes(output.picture(row))
    query, contexts = thumbnails.of_file(row[QUERY]), [thumbnails.of_file(uri) for uri in row[CONTEXT]]
    return {**row, "image": None, "made": made, "query_thumbnail": query, "context_thumbnails": contexts}


class _Thumbnails:
    """Small pictures as data: URLs; contexts repeat, so each file is read once."""

    def __init__(self, output: Output) -> None:
        self._output, self._known = output, dict[str, str | None]()

    def of_file(self, uri: str | None) -> str | None:
        """None where the picture was inline in the manifest or is gone."""
        if uri is None or uri == "inline":
            return None
        if uri not in self._known:
            try:
                self._known[uri] = self.of_bytes(self._output.storage.read_input(uri, Limits().max_bytes))
            except ContextDiffusionError:
                self._known[uri] = None
        return self._known[uri]

    def of_bytes(self, data: bytes) -> str:
        image, sink = Image.fromarray(decode_image(data, Limits(), "thumbnail")), io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(sink, "WEBP", quality=85)
        return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()
