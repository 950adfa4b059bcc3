"""Two folders of pictures -> a manifest: which query goes with which contexts and prompt. The same folders,
the same file.

A context is one picture, or with sub-folders all pictures of one: a style each. Names decide the order;
nothing is decoded.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from context_diffusion.core.errors import JobError, ManifestError
from context_diffusion.core.schema import CONTEXT, ID, PROMPT, QUERY
from context_diffusion.core.uris import normal, parent
from context_diffusion.inputs.decode import ENDINGS
from context_diffusion.inputs.manifest_files import FORMATS, visible
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import to_parquet

Pair = Literal["all", "zip", "random"]
Triple = tuple[str, list[str], str | None]  # query, contexts, prompt
SCHEMA = pa.schema(
    [(ID, pa.string()), (QUERY, pa.string()), (CONTEXT, pa.list_(pa.string())), (PROMPT, pa.string())]
)
MOST = 5_000_000  # rows of a manifest that is held in memory


@dataclass(frozen=True)
class Pairing:
    """contexts_per_row: left out, one of a plain folder, all of a sub-folder. seed: of what is drawn."""

    queries: str
    contexts: str
    pair: Pair
    contexts_per_row: int | None = None
    prompts: str | None = None
    seed: int = 0


def write_manifest(pairing: Pairing, out: str) -> dict[str, Any]:
    """Parquet, JSONL or CSV by the ending of `out`. -> its URI, rows, and the folders that a job must allow
    beside its own. Raises JobError, ManifestError with what is wrong.
    """
    uri, storage = normal(out), Storage()
    form = next((form for ending, form in FORMATS.items() if uri.lower().endswith(ending)), None)
    if form is None:
        raise JobError(f"--out {out}: the name of a manifest ends in one of {', '.join(FORMATS)}")
    if storage.exists(uri):
        raise JobError(f"--out {out} is there already; remove it, or choose another name")
    triples, base = list(pair_up(pairing, storage)), parent(uri)
    rows = [
        {
            ID: f"{number:06d}-{PurePosixPath(query).stem}",
            QUERY: _relative(query, base),
            CONTEXT: [_relative(context, base) for context in contexts],
            PROMPT: prompt,
        }
        for number, (query, contexts, prompt) in enumerate(triples)
    ]
    try:
        data = _encoded(rows, form)
    except UnicodeEncodeError as error:
        raise ManifestError(f"a picture's name is not UTF-8: {error.object[:200]!r}; rename it") from error
    if not storage.create(uri, data):
        raise JobError(f"--out {out} is there already; remove it, or choose another name")
    folders = (normal(pairing.queries), normal(pairing.contexts))
    return {
        "manifest": uri,
        "rows": len(rows),
        "allow": [one for one in folders if not f"{one}/".startswith(f"{base}/")],
    }


def pair_up(pairing: Pairing, storage: Storage) -> Iterator[Triple]:
    """Raises ManifestError."""
    queries = _pictures("--queries", pairing.queries, storage)
    groups = _groups(pairing, storage)
    prompts = _prompts(pairing.prompts, storage)
    if pairing.pair == "all":
        if (rows := len(queries) * len(groups) * len(prompts)) > MOST:
            raise ManifestError(
                f"--pair all makes {rows} rows, at most {MOST}: choose random, or fewer pictures"
            )
        yield from itertools.product(queries, groups, prompts)
    elif pairing.pair == "zip":
        lines = prompts * len(queries) if pairing.prompts is None else prompts
        if not len(queries) == len(groups) == len(lines):
            told = f"{len(queries)} queries, {len(groups)} contexts" + (
                f", {len(prompts)} prompts" if pairing.prompts else ""
            )
            raise ManifestError(f"--pair zip goes one by one, but there are {told}")
        yield from zip(queries, groups, lines, strict=True)
    else:
        drawn = random.Random(pairing.seed)
        for query in queries:
            group = drawn.choice(groups)
            chosen = sorted(drawn.sample(group, pairing.contexts_per_row or len(group)))
            yield query, chosen, drawn.choice(prompts)


def _groups(pairing: Pairing, storage: Storage) -> list[list[str]]:
    """The pictures that go together as one row's contexts; for random, those that they are drawn of."""
    pictures, root = _pictures("--contexts", pairing.contexts, storage), normal(pairing.contexts)
    styles = {
        style: list(found)
        for style, found in itertools.groupby(pictures, lambda uri: _first_folder(uri, root))
    }
    size = pairing.contexts_per_row
    if "" in styles and len(styles) > 1:
        others = ", ".join(sorted(styles.keys() - {""})[:3])
        told = f"pictures ({styles[''][0]}) and sub-folders ({others})"
        raise ManifestError(f"--contexts {pairing.contexts} holds {told}: move one kind away")
    smallest = min(styles, key=lambda style: len(styles[style]))
    if size and size > len(styles[smallest]):
        where = f"{pairing.contexts}/{smallest}".rstrip("/")
        raise ManifestError(f"--contexts-per-row {size}: {where} has only {len(styles[smallest])} pictures")
    if "" not in styles:
        return [found if pairing.pair == "random" else found[:size] for found in styles.values()]
    if pairing.pair == "random":
        return [pictures] if size else [[one] for one in pictures]
    step = size or 1
    if len(pictures) % step:
        raise ManifestError(
            f"--contexts-per-row {size}: the {len(pictures)} pictures of {pairing.contexts} leave a rest"
        )
    return [pictures[first : first + step] for first in range(0, len(pictures), step)]


def _first_folder(uri: str, root: str) -> str:
    below = uri.removeprefix(f"{root}/")
    return below.partition("/")[0] if "/" in below else ""


def _pictures(option: str, folder: str, storage: Storage) -> list[str]:
    """All below a folder, in the order of their names."""
    root = normal(folder)
    if not storage.is_folder(root):
        raise ManifestError(f"{option} {folder}: there is no such folder")
    found = [uri for uri in visible(storage.files(root), root) if uri.lower().endswith(ENDINGS)]
    if not found:
        raise ManifestError(f"{option} {folder}: no pictures in it ({', '.join(ENDINGS)})")
    return sorted(found, key=lambda uri: uri.removeprefix(root).split("/"))


def _prompts(file: str | None, storage: Storage) -> list[str | None]:
    """One a line; an empty line is no prompt."""
    if file is None:
        return [None]
    try:
        lines = storage.read(normal(file)).decode().splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        raise ManifestError(f"--prompts {file}: no text file with a prompt a line: {error}") from error
    if not lines:
        raise ManifestError(f"--prompts {file}: the file is empty")
    return [line.strip() or None for line in lines]


def _relative(uri: str, base: str) -> str:
    """As the manifest in `base` says it: what lies below moves along with it."""
    return uri.removeprefix(f"{base.rstrip('/')}/")


def _encoded(rows: list[dict[str, Any]], form: str) -> bytes:
    if form == "parquet":
        return to_parquet(pa.Table.from_pylist(rows, SCHEMA))
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    sink = io.StringIO()
    writer = csv.DictWriter(sink, SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {CONTEXT: json.dumps(row[CONTEXT], ensure_ascii=False)} for row in rows)
    return sink.getvalue().encode()
