"""`context-diffusion view`: report.html's page over all rows of an OUTPUT, from a server for this machine alone.

/                               the page, its figures counted anew: a job that runs is seen to grow
/rows?text=&status=&sort=...    a page of rows (outputs/report/query.py)
/row?id=&index=                 one row, for links
/picture/PART/NUMBER/NAME       of a row by its place; NAME: whole, made, query, or a context's number
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
from context_diffusion.outputs.report.page import render
from context_diffusion.outputs.report.query import Question
from context_diffusion.outputs.report.row_index import Index
from context_diffusion.outputs.report.row_sample import Place
from context_diffusion.outputs.report.viewer_cache import Shelf

HOST = "127.0.0.1"
HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}
TYPES = {field.name: {"str": str, "float": float, "int": int}[str(field.type)] for field in fields(Question)}


class Viewer:
    """What is answered, of one OUTPUT. Starlette calls it from several threads."""

    def __init__(self, output: Output, tell: Callable[[str], None] = lambda _: None) -> None:
        self.output, self.index, self.shelf = output, Index(output, tell), Shelf(output)

    def page(self, _: Request) -> Response:
        self.index.refresh()
        counted = self.index.counts()
        summary = self.output.read_json(self.output.summary) if self.output.storage.exists(self.output.summary) else {}
        summary |= {"output": self.output.root, **{key: value for key, value in counted.items() if key != "of"}}
        data = {"served": True, "of": counted["of"], "codes": self.index.codes(), "reasons": self.index.reasons()}
        data["histograms"] = list(self.index.histograms())
        return Response(render(summary, data, connect="'self'"), media_type="text/html", headers=HEADERS)

    def rows(self, request: Request) -> Response:
        try:
            question = Question(**{name: TYPES[name](value) for name, value in request.query_params.items()})
        except (KeyError, ValueError) as error:
            raise HTTPException(400, f"not a question that is known: {error}") from None
        total, places = self.index.find(question)
        return _json({"total": total, "rows": self._cards(places)})

    def row(self, request: Request) -> Response:
        asked = request.query_params
        index = asked.get("index", "0")
        place = self.index.place(asked.get("id", ""), int(index)) if index.isdecimal() and len(index) < 10 else None
        return _json({"row": self._cards([place])[0] if place else None})

    def _cards(self, places: list[Place]) -> list[dict[str, Any]]:
        return [self._card(place, row) for place, row in zip(places, self.shelf.rows(places), strict=True)]

    def _card(self, place: Place, row: dict[str, Any]) -> dict[str, Any]:
        url = f"picture/{place[0]}/{place[1]}"
        made = row["status"] == "ok"
        shown = card(row, f"{url}/whole" if made else None) | {"made": f"{url}/made" if made else None}
        for name, source in (("query", shown[QUERY]), *enumerate(shown[CONTEXT])):
            source["picture"] = f"{url}/{name}" if source["uri"] not in (None, INLINE) else None
        return shown

    def picture(self, request: Request) -> Response:
        asked = request.path_params
        place, name = (asked["part"], asked["number"]), asked["name"]
        if not self.index.holds(place):
            raise HTTPException(404, "no such row")
        data, kind = None, ""
        with suppress(RowError):  # it is gone, or no picture any more
            data, kind = self._picture(place, name)
        if data is None:
            return Response(status_code=204, headers=HEADERS)  # no error: the page shows that there is none
        return Response(data, headers=HEADERS, media_type=kind)

    def _picture(self, place: Place, name: str) -> tuple[bytes | None, str]:
        if name == "whole":
            return self.shelf.made(place)
        if name == "made":
            return self.shelf.made_thumbnail(place), "image/webp"
        if name == "query":
            return self.shelf.source_thumbnail(place, None), "image/webp"
        number = int(name) if name.isdecimal() and len(name) < 4 else CONTEXTS
        return self.shelf.source_thumbnail(place, number) if number < CONTEXTS else None, "image/webp"


def _json(value: Any) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json", headers=HEADERS)


def _away(_: Request, error: Exception) -> Response:
    """A store that is away, a part that cannot be read: the page says so and goes on."""
    return Response(str(error), 503, HEADERS, "text/plain")


def make_app(viewer: Viewer) -> Starlette:
    """Other names for this host are refused: a web page elsewhere must not read through the browser (DNS rebinding)."""
    routes = [
        Route("/", viewer.page),
        Route("/rows", viewer.rows),
        Route("/row", viewer.row),
        Route("/picture/{part:int}/{number:int}/{name}", viewer.picture),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts], exception_handlers={ContextDiffusionError: _away})


def serve(output: Output, port: int, tell: Callable[[str], None]) -> str:
    """Until Ctrl-C or SIGTERM. port 0: any that is free. -> the URL. Raises JobError where the port is taken."""
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise JobError(f"--port {port}: {error.strerror}; choose another, 0 takes any that is free") from None
    url = f"http://{HOST}:{listening.getsockname()[1]}/"
    tell(f"reading {output.root}/data")
    viewer = Viewer(output, tell)
    tell(f"{url} shows {output.root}; Ctrl-C ends it")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(make_app(viewer), log_level="warning")).run([listening])
    finally:
        viewer.index.close()
        listening.close()
    return url
