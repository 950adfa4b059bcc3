"""Writes a manifest that pairs the images of two folders, queries and contexts, and prompts.

A context is one image, or a style: the images of one sub-folder. Images are ordered by name, so the same
folders give the same manifest. Decodes no images.
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
MAX_ROWS = 5_000_000  # the manifest is built in memory


@dataclass(frozen=True)
class Pairing:
    """How queries, contexts and prompts are combined to rows.

    contexts_per_row: default: one image of a plain folder, all images of a sub-folder; seed: of random
    choices.
    """

    queries: str
    contexts: str
    pair: Pair
    contexts_per_row: int | None = None
    prompts: str | None = None
    seed: int = 0


def write_manifest(pairing: Pairing, out: str) -> dict[str, Any]:
    """Write a manifest whose format follows from the ending of `out`: Parquet, JSONL or CSV.

    Returns its URI, its number of rows, and the folders that a job must allow in addition to the manifest's
    own. Raises JobError, ManifestError.
    """
    uri = normal(out)
    storage = Storage()
    manifest_format = next((name for ending, name in FORMATS.items() if uri.lower().endswith(ending)), None)
    if manifest_format is None:
        raise JobError(f"--out {out}: expected a name that ends in one of {', '.join(FORMATS)}")
    if storage.exists(uri):
        raise JobError(f"--out {out} exists already: remove it or choose another name")
    base = parent(uri)
    rows = [
        {
            ID: f"{number:06d}-{PurePosixPath(query).stem}",
            QUERY: _relative(query, base),
            CONTEXT: [_relative(context, base) for context in contexts],
            PROMPT: prompt,
        }
        for number, (query, contexts, prompt) in enumerate(pair_up(pairing, storage))
    ]
    try:
        data = _encoded(rows, manifest_format)
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"the name of an image is not UTF-8: {error.object[:200]!r}; rename it"
        ) from error
    if not storage.create(uri, data):
        raise JobError(f"--out {out} exists already: remove it or choose another name")
    folders = [normal(pairing.queries), normal(pairing.contexts)]
    allow = [folder for folder in folders if not f"{folder}/".startswith(f"{base}/")]
    return {"manifest": uri, "rows": len(rows), "allow": allow}


def pair_up(pairing: Pairing, storage: Storage) -> Iterator[Triple]:
    """Yield the query, contexts and prompt of each row. Raises ManifestError."""
    queries = _images("--queries", pairing.queries, storage)
    groups = _context_groups(pairing, storage)
    prompts = _prompts(pairing.prompts, storage)
    if pairing.pair == "all":
        rows = len(queries) * len(groups) * len(prompts)
        if rows > MAX_ROWS:
            advice = "use --pair random or fewer images"
            raise ManifestError(f"--pair all makes {rows} rows, at most {MAX_ROWS} are allowed: {advice}")
        yield from itertools.product(queries, groups, prompts)
    elif pairing.pair == "zip":
        row_prompts = prompts * len(queries) if pairing.prompts is None else prompts
        if not len(queries) == len(groups) == len(row_prompts):
            counts = f"queries: {len(queries)}, contexts: {len(groups)}"
            counts += f", prompts: {len(prompts)}" if pairing.prompts else ""
            raise ManifestError(f"--pair zip needs equal numbers of each; {counts}")
        yield from zip(queries, groups, row_prompts, strict=True)
    else:
        generator = random.Random(pairing.seed)
        for query in queries:
            group = generator.choice(groups)
            contexts = sorted(generator.sample(group, pairing.contexts_per_row or len(group)))
            yield query, contexts, generator.choice(prompts)


def _context_groups(pairing: Pairing, storage: Storage) -> list[list[str]]:
    """Return the contexts of each row; with `random`, the groups from which a row's contexts are drawn."""
    images = _images("--contexts", pairing.contexts, storage)
    root = normal(pairing.contexts)
    styles = {
        style: list(uris) for style, uris in itertools.groupby(images, lambda uri: _first_folder(uri, root))
    }
    size = pairing.contexts_per_row
    _check_styles(pairing, styles)
    if "" not in styles:
        return [uris if pairing.pair == "random" else uris[:size] for uris in styles.values()]
    if pairing.pair == "random":
        return [images] if size else [[uri] for uri in images]
    step = size or 1
    if len(images) % step:
        problem = f"the {len(images)} images of {pairing.contexts} cannot be divided into groups of {size}"
        raise ManifestError(f"--contexts-per-row {size}: {problem}")
    return [images[first : first + step] for first in range(0, len(images), step)]


def _check_styles(pairing: Pairing, styles: dict[str, list[str]]) -> None:
    """Raise ManifestError for images beside sub-folders and for styles with too few images.

    styles: the images by sub-folder; "" for the folder itself.
    """
    if "" in styles and len(styles) > 1:
        folders = ", ".join(sorted(styles.keys() - {""})[:3])
        both = f"images ({styles[''][0]}) and sub-folders ({folders})"
        raise ManifestError(f"--contexts {pairing.contexts} has {both}: keep one of the two")
    smallest = min(styles, key=lambda style: len(styles[style]))
    count = len(styles[smallest])
    size = pairing.contexts_per_row
    if size and size > count:
        folder = f"{pairing.contexts}/{smallest}".rstrip("/")
        raise ManifestError(f"--contexts-per-row {size}: {folder} has only {count} images")


def _first_folder(uri: str, root: str) -> str:
    """Return the sub-folder of `root` that a file is in, or "" for files of `root` itself."""
    path = uri.removeprefix(f"{root}/")
    return path.partition("/")[0] if "/" in path else ""


def _images(option: str, folder: str, storage: Storage) -> list[str]:
    """Return the images below a folder, sorted by name. Raises ManifestError."""
    root = normal(folder)
    if not storage.is_folder(root):
        raise ManifestError(f"{option} {folder}: the folder does not exist")
    images = [uri for uri in visible(storage.files(root), root) if uri.lower().endswith(ENDINGS)]
    if not images:
        raise ManifestError(f"{option} {folder}: the folder has no images ({', '.join(ENDINGS)})")
    return sorted(images, key=lambda uri: uri.removeprefix(root).split("/"))


def _prompts(file: str | None, storage: Storage) -> list[str | None]:
    """Read one prompt per line; an empty line means no prompt. Raises ManifestError."""
    if file is None:
        return [None]
    try:
        lines = storage.read(normal(file)).decode().splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"--prompts {file}: expected a text file with one prompt per line: {error}"
        ) from error
    if not lines:
        raise ManifestError(f"--prompts {file}: the file is empty")
    return [line.strip() or None for line in lines]


def _relative(uri: str, base: str) -> str:
    """Return a URI relative to the manifest's folder, if it is below it."""
    return uri.removeprefix(f"{base.rstrip('/')}/")


def _encoded(rows: list[dict[str, Any]], manifest_format: str) -> bytes:
    if manifest_format == "parquet":
        return to_parquet(pa.Table.from_pylist(rows, SCHEMA))
    if manifest_format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    sink = io.StringIO()
    writer = csv.DictWriter(sink, SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {CONTEXT: json.dumps(row[CONTEXT], ensure_ascii=False)} for row in rows)
    return sink.getvalue().encode()
