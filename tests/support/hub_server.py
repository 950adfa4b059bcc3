"""A Hugging Face Hub in small: the public API's answers for the folders of one directory, and a count of what was fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(root: Path) -> Iterator[tuple[str, Counter[str]]]:
    """root/OWNER/NAME/... -> its endpoint, and how often each file's bytes were asked for."""
    fetched: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo = "/".join(parts[2:4])
                files = [str(p.relative_to(root / repo)) for p in sorted((root / repo).rglob("*")) if p.is_file()]
                found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                if "tree" in parts:
                    sizes = [(name, (root / repo / name).stat().st_size) for name in files]
                    found = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes]
                self._send(200 if files else 404, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
                return
            file = root.joinpath(*parts[:2], *parts[4:])
            if parts[2:3] != ["resolve"] or not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            if body:
                fetched["/".join(parts[:2] + parts[4:])] += 1
            data = file.read_bytes()
            self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, body)

        def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
