"""A Hugging Face Hub in small: the public API's answers for the folders of one directory, and a count of what
was fetched."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from support.http_server import Answer, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(root: Path, gated: str | None = None) -> Iterator[tuple[str, Counter[str]]]:
    """root/OWNER/NAME/... -> its endpoint, and how often each file's bytes were asked for.

    gated: a repository whose licence nobody has accepted."""
    fetched: Counter[str] = Counter()

    def answer(method: str, path: str) -> Answer:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return _of_api(root, "/".join(parts[2:4]), "tree" in parts, _commit(parts[-1]))
        if "/".join(parts[:2]) == gated:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        file = root.joinpath(*parts[:2], *parts[4:])
        if parts[2:3] != ["resolve"] or not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        fetched["/".join(parts[:2] + parts[4:])] += method == "GET"
        data = file.read_bytes()
        return (
            200,
            {"X-Repo-Commit": _commit(parts[3]), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'},
            data,
        )

    with serving(answer, ranges=True) as endpoint:
        yield endpoint, fetched


def _commit(revision: str) -> str:
    """The commit of a revision: a commit is one already."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else COMMIT


def _of_api(root: Path, repo: str, tree: bool, commit: str) -> Answer:
    """What the API tells of a repository: its files, with their sizes where the tree is asked for."""
    files = [
        str(path.relative_to(root / repo)) for path in sorted((root / repo).rglob("*")) if path.is_file()
    ]
    told: object = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    if tree:
        sizes = [(name, (root / repo / name).stat().st_size) for name in files]
        told = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes]
    return 200 if files else 404, {"Content-Type": "application/json"}, json.dumps(told).encode()
