"""Writes summary.json and report.html: figures, images beside their queries and contexts, and failed rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import Any
from urllib.parse import quote

from context_diffusion.core.schema import CONTEXT, QUERY
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.cards import COLUMNS, card, has_own_file
from context_diffusion.outputs.report.glossary import glossary
from context_diffusion.outputs.report.job_facts import job_facts
from context_diffusion.outputs.report.page import render
from context_diffusion.outputs.report.row_sample import sample_rows
from context_diffusion.outputs.report.sweep_grid import contact_sheets
from context_diffusion.outputs.report.thumbnails import Frame, ImageReader, frame_of

FramedUri = tuple[str, Frame | None]  # a query or context, and the frame of its thumbnail
SourceThumbnails = Callable[[Iterable[FramedUri]], Iterable[bytes | None]]
PAGE_BYTES = 9 * 2**20  # the rows, then thumbnails while they fit: outputs, queries, contexts


def rebuild(output: Output) -> dict[str, Any]:
    """Count again and write summary.json and report.html.

    Figures that only the run could measure are kept.
    """
    counts = output.count()
    summary = output.read_json(output.summary) if output.storage.exists(output.summary) else {}
    summary |= {"output": output.root, **vars(counts)}
    output.storage.replace(output.summary, json.dumps(summary, indent=2).encode())
    write_report(output, summary)
    if output.storage.exists(output.success):
        close(output)  # the checksums of the two files changed
    return summary


def write_report(output: Output, summary: dict[str, Any]) -> None:
    """Write report.html, one file that opens from disk without a network: it contains its thumbnails."""
    sample = sample_rows(output, summary["images"])
    plan = output.read_plan()
    facts = job_facts(output, plan, summary, sample.last_image)
    images = ImageReader(output, plan)
    by_shard = groupby(sample.positions, lambda position: position[0])
    chosen = [(shard, [number for _, number in positions]) for shard, positions in by_shard]
    sheets = contact_sheets(
        output,
        plan["job"].get("matrix") or {},
        lambda row: _data_url(images.output_thumbnail(row)),
        lambda uri, frame: _data_url(images.source_thumbnail(uri, frame)),
    )
    with ThreadPoolExecutor(images.threads) as threads:
        parts = threads.map(lambda shard_rows: _read_rows(output, images, *shard_rows), chosen)
        rows = [row for part in parts for row in part]
        data = {
            "served": False,
            "entries": sample.rows,
            "histograms": sample.histograms,
            "codes": summary["codes"],
            "glossary": glossary(),
            "rows": [card(row, _relative_url(row), output.root) for row in rows],
        }
        room = PAGE_BYTES - len(render(summary, facts, data, sheets))

        def source_thumbnails(sources: Iterable[FramedUri]) -> Iterable[bytes | None]:
            return threads.map(lambda source: images.source_thumbnail(*source), sources)

        data["thumbnails"] = _add_thumbnails(rows, data["rows"], source_thumbnails, room)
    output.storage.replace(output.report, render(summary, facts, data, sheets))


def _read_rows(output: Output, images: ImageReader, shard: int, numbers: list[int]) -> list[dict[str, Any]]:
    """Read rows of one part. Their `image` is a thumbnail."""
    part = output.read_part(shard, [*COLUMNS, *images.columns])
    rows = part.take(numbers).to_pylist()
    for row in rows:
        row["image"] = images.output_thumbnail(row) if row["status"] == "ok" else None
    return rows


def _relative_url(row: dict[str, Any]) -> str | None:
    """Return the URL of an image file, relative to the page; None for an image in a tar or a part."""
    name = row["file_name"]
    return quote(name, safe="/") if has_own_file(name) else None


def _add_thumbnails(
    rows: list[dict[str, Any]], cards: list[dict[str, Any]], source_thumbnails: SourceThumbnails, room: int
) -> list[str]:
    """Set each `thumbnail` of the cards to a position in the returned list of data: URLs; None if it is full.

    room: of the list, in bytes. Equal thumbnails of queries and contexts are stored once.
    """
    urls: list[str] = []

    def store(data: bytes | None) -> int | None:
        nonlocal room
        url = _data_url(data)
        if url is None or len(url) > room:
            return None
        room -= len(url) + 3
        urls.append(url)
        return len(urls) - 1

    pairs = list(zip(cards, rows, strict=True))
    for row_card, row in pairs:
        row_card["thumbnail"] = store(row["image"])
    sources: list[tuple[dict[str, Any], FramedUri]] = []
    for row_card, row in pairs:
        sources.append((row_card[QUERY], (row[QUERY], frame_of(row))))
    for row_card, row in pairs:  # a card shows the first contexts only
        contexts = zip(row_card[CONTEXT], row[CONTEXT] or [], strict=False)
        sources += [(context, (uri, None)) for context, uri in contexts]
    unique = dict.fromkeys(framed_uri for _, framed_uri in sources)
    stored = dict(zip(unique, map(cache(store), source_thumbnails(unique)), strict=True))
    for source, framed_uri in sources:
        source["thumbnail"] = stored[framed_uri]
    return urls


def _data_url(thumbnail: bytes | None) -> str | None:
    return None if thumbnail is None else "data:image/webp;base64," + base64.b64encode(thumbnail).decode()
