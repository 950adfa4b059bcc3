"""Serves the page of report.html over all rows of an OUTPUT, to this machine only: `context-diffusion view`.

/                             the page with current figures, also of a running job
/rows?text=&status=&sort=...  a page of rows (outputs/report/query.py)
/row?id=&index=               one row, for links
/image/PART/NUMBER/NAME       an image of a row, by its position; NAME: full, output, query or context number
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from context_diffusion.core.errors import ContextDiffusionError, JobError, RowError
from context_diffusion.core.schema import CONTEXT, QUERY
from context_diffusion.inputs.image_sources import INLINE
from context_diffusion.outputs.output_folder import Output
from context_diffusion.outputs.report.cards import CONTEXTS, card
from context_diffusion.outputs.report.glossary import glossary
from context_diffusion.outputs.report.job_facts import job_facts
from context_diffusion.outputs.report.page import render
from context_diffusion.outputs.report.query import RowQuery
from context_diffusion.outputs.report.row_index import RowIndex
from context_diffusion.outputs.report.row_sample import Position
from context_diffusion.outputs.report.viewer_cache import ViewerCache

HOST = "127.0.0.1"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
WEBP = "image/webp"
TYPES = {field.name: {"str": str, "float": float, "int": int}[str(field.type)] for field in fields(RowQuery)}


class Viewer:
    """The responses of the server, for one OUTPUT. Starlette calls it from several threads."""

    def __init__(self, output: Output, notify: Callable[[str], None] = lambda _: None) -> None:
        """notify: called with progress lines while OUTPUT is read."""
        self.output = output
        self.index = RowIndex(output, notify)
        self.cache = ViewerCache(output)

    def page(self, _: Request) -> Response:
        self.index.refresh()
        counts = self.index.counts()
        entries = counts.pop("entries")
        summary = (
            self.output.read_json(self.output.summary)
            if self.output.storage.exists(self.output.summary)
            else {}
        )
        summary |= {"output": self.output.root, **counts}
        facts = job_facts(self.output, self.output.read_plan(), summary, self.index.last_image())
        data = {
            "served": True,
            "entries": entries,
            "codes": self.index.codes(),
            "reasons": self.index.reasons(),
            "histograms": list(self.index.histograms()),
            "glossary": glossary(),
        }
        page = render(summary, facts, data, connect="'self'")
        return Response(page, media_type="text/html", headers=HEADERS)

    def rows(self, request: Request) -> Response:
        try:
            query = RowQuery(**{name: TYPES[name](value) for name, value in request.query_params.items()})
        except KeyError as error:
            raise HTTPException(400, f"unknown parameter {error}: expected {', '.join(TYPES)}") from None
        except ValueError as error:
            raise HTTPException(400, f"invalid query: {error}") from None
        total, positions = self.index.find(query)
        return _json({"total": total, "rows": self._cards(positions)})

    def row(self, request: Request) -> Response:
        row_id = request.query_params.get("id", "")
        index = _number(request.query_params.get("index", "0"), digits=9)
        position = None if index is None else self.index.position(row_id, index)
        return _json({"row": self._cards([position])[0] if position else None})

    def _cards(self, positions: list[Position]) -> list[dict[str, Any]]:
        rows = self.cache.rows(positions)
        return [self._card(position, row) for position, row in zip(positions, rows, strict=True)]

    def _card(self, position: Position, row: dict[str, Any]) -> dict[str, Any]:
        url = f"image/{position[0]}/{position[1]}"
        ok = row["status"] == "ok"
        row_card = card(row, f"{url}/full" if ok else None, self.output.root)
        row_card["thumbnail"] = f"{url}/output" if ok else None
        for name, source in (("query", row_card[QUERY]), *enumerate(row_card[CONTEXT])):
            source["thumbnail"] = f"{url}/{name}" if source["uri"] not in (None, INLINE) else None
        return row_card

    def image(self, request: Request) -> Response:
        position = (request.path_params["part"], request.path_params["number"])
        if not self.index.contains(position):
            raise HTTPException(404, "row not found")
        data, media_type = None, ""
        with suppress(RowError):  # the file is missing or damaged
            data, media_type = self._image(position, request.path_params["name"])
        if data is None:
            # not an error: the page shows that there is no image
            return Response(status_code=204, headers=HEADERS)
        return Response(data, headers=HEADERS, media_type=media_type)

    def _image(self, position: Position, name: str) -> tuple[bytes | None, str]:
        """Return an image and its media type."""
        if name == "full":
            return self.cache.output_image(position)
        if name == "output":
            return self.cache.output_thumbnail(position), WEBP
        if name == "query":
            return self.cache.source_thumbnail(position, None), WEBP
        number = _number(name, digits=3)
        if number is None or number >= CONTEXTS:
            return None, WEBP
        return self.cache.source_thumbnail(position, number), WEBP


def _number(text: str, digits: int) -> int | None:
    """Parse a non-negative integer of at most so many digits."""
    return int(text) if text.isdecimal() and len(text) <= digits else None


def _json(value: Any) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json", headers=HEADERS)


def _unavailable(_: Request, error: Exception) -> Response:
    """Report an unavailable store or an unreadable part; the page shows the message."""
    return Response(str(error), 503, HEADERS, "text/plain")


def make_app(viewer: Viewer) -> Starlette:
    """Create the app.

    It refuses other host names, so that no foreign web page can read from it (DNS rebinding).
    """
    routes = [
        Route("/", viewer.page),
        Route("/rows", viewer.rows),
        Route("/row", viewer.row),
        Route("/image/{part:int}/{number:int}/{name}", viewer.image),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(
        routes=routes, middleware=[hosts], exception_handlers={ContextDiffusionError: _unavailable}
    )


def serve(output: Output, port: int, notify: Callable[[str], None]) -> str:
    """Serve until Ctrl-C or SIGTERM, and return the URL. port 0: any free port.

    Raises JobError if the port is in use.
    """
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        message = f"--port {port}: {error.strerror}; choose another port, or 0 for any free port"
        raise JobError(message) from None
    url = f"http://{HOST}:{listening.getsockname()[1]}/"
    notify(f"reading {output.root}/data")
    viewer = Viewer(output, notify)
    notify(f"{url} shows {output.root}; press Ctrl-C to stop")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(make_app(viewer), log_level="warning")).run([listening])
    finally:
        viewer.index.close()
        listening.close()
    return url
