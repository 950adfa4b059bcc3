"""summary.json and report.html: the figures, the pictures beside their queries and contexts, the failures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import Any

from context_diffusion.core.schema import CONTEXT, QUERY
from context_diffusion.outputs.finalize import close
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.cards import COLUMNS, card, relative_url
from context_diffusion.outputs.report.page import render
from context_diffusion.outputs.report.row_sample import survey
from context_diffusion.outputs.report.sweep_grid import contact_sheets
from context_diffusion.outputs.report.thumbnails import OURS, Frame, Pictures, frame_of

Shown = tuple[str, Frame | None]  # a query or context, and the shape in which it is shown
PAGE_BYTES = 9 * 2**20  # rows first, then thumbnails while there is room: made pictures, queries, contexts


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
    found, pictures = survey(output, summary["images"]), Pictures(output)
    with ThreadPoolExecutor(pictures.threads) as threads:
        shards = [(shard, [row for _, row in some]) for shard, some in groupby(found.places, lambda place: place[0])]
        rows = [row for some in threads.map(lambda shard: _rows(output, pictures, *shard), shards) for row in some]
        cards = [card(row, _beside(row)) for row in rows]
        data = {"served": False, "of": found.rows, "histograms": found.histograms, "codes": summary["codes"], "rows": cards}
        sheets = contact_sheets(
            output,
            lambda row: _data_url(pictures.made_thumbnail(row)),
            lambda uri, frame: _data_url(pictures.source_thumbnail(uri, frame)),
        )
        room = PAGE_BYTES - len(render(summary, data, sheets))
        data["pictures"] = _add_thumbnails(
            rows, cards, lambda shown: threads.map(lambda one: pictures.source_thumbnail(*one), shown), room
        )
    output.storage.replace(output.report, render(summary, data, sheets))


def _rows(output: Output, pictures: Pictures, shard: int, chosen: list[int]) -> list[dict[str, Any]]:
    """Rows of one part, each with the thumbnail of its picture, not the picture itself, under `image`."""
    part = output.read_part(shard, [*COLUMNS, *pictures.columns])
    rows = part.take(chosen).to_pylist()
    for row in rows:
        row["image"] = pictures.made_thumbnail(row) if row["status"] == "ok" else None
    return rows


def _beside(row: dict[str, Any]) -> str | None:
    """The URL of a picture file that lies beside the page, in OUTPUT."""
    name = row["file_name"]
    return relative_url(name) if name and OURS.fullmatch(name) and ".tar/" not in name else None


def _add_thumbnails(
    rows: list[dict[str, Any]],
    cards: list[dict[str, Any]],
    thumbnails: Callable[[Iterable[Shown]], Iterable[bytes | None]],
    room: int,
) -> list[str]:
    """Sets each card's `made` and `picture`s to places in the list of data: URLs that it gives back; contexts repeat, each
    file stands in it once, and a query once more where it was cut to its picture's shape. room: bytes."""
    made: list[str] = []

    def keep(data: bytes | None) -> int | None:
        nonlocal room
        url = _data_url(data)
        if url is None or len(url) > room:
            return None
        room -= len(url) + 3
        made.append(url)
        return len(made) - 1

    for shown, row in zip(cards, rows, strict=True):
        shown["made"] = keep(row["image"])
    sources: list[tuple[dict[str, Any], Shown]] = []
    for shown, row in zip(cards, rows, strict=True):
        sources.append((shown[QUERY], (row[QUERY], frame_of(row))))
    for shown, row in zip(cards, rows, strict=True):  # of many contexts the first are shown
        sources += [(source, (uri, None)) for source, uri in zip(shown[CONTEXT], row[CONTEXT] or [], strict=False)]
    once = dict.fromkeys(wanted for _, wanted in sources)
    kept = dict(zip(once, map(cache(keep), thumbnails(once)), strict=True))
    for source, wanted in sources:
        source["picture"] = kept[wanted]
    return made


def _data_url(thumbnail: bytes | None) -> str | None:
    return None if thumbnail is None else "data:image/webp;base64," + base64.b64encode(thumbnail).decode()
