"""What to score: each finished picture with its query, contexts and prompt. Sources only, nothing is decoded here.

Pictures lie in an OUTPUT of ours or in any folder; what they were made from, a manifest says or OUTPUT's own rows.
All pairs are held in memory, with the bytes that lie inside a Parquet file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from context_diffusion.core.errors import ErrorCode, JobError, ManifestError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.job_base import Fit
from context_diffusion.core.schema import CONTEXT, ID, PROMPT, QUERY
from context_diffusion.core.uris import normal, parent, resolve
from context_diffusion.inputs.decode import ENDINGS
from context_diffusion.inputs.image_sources import INLINE, ImageSource, as_source
from context_diffusion.inputs.manifest_files import expand, open_file, raw_rows
from context_diffusion.inputs.rows import RowRules, read_table, row_id
from context_diffusion.inputs.text_rows import Row
from context_diffusion.inputs.url_policy import allowed_prefixes
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

NOWHERE: ImageSource = {"bytes": None, "path": None}  # of a row that tells why
READ_COLUMNS = (ID, "index", "error_code", "error_message", "file_name", "image", QUERY, CONTEXT, PROMPT, "fit")


@dataclass(frozen=True)
class Pair:
    """A picture and what it was made from. error: (code, message) of a row that cannot be scored; reference: the picture
    that the manifest's column of that name says."""

    id: str
    index: int
    picture: ImageSource | None
    query: ImageSource
    contexts: list[ImageSource]
    prompt: str | None
    fit: Fit
    error: tuple[str, str] | None = None
    reference: ImageSource | None = None


def source_key(source: ImageSource) -> str:
    """What tells a source from another: its path, or a hash of its bytes."""
    return source["path"] if source["bytes"] is None else hashlib.blake2b(source["bytes"], digest_size=16).hexdigest()


def find_pairs(job: EvaluateJob, storage: Storage) -> tuple[list[Pair], list[str]]:
    """-> the pairs, and the prefixes under which their sources may lie. Raises JobError, ManifestError."""
    folder = Output(normal(job.images), storage)
    ours = storage.exists(folder.plan)
    if not ours and not storage.is_folder(folder.root):
        raise JobError(f"images: {job.images} is no folder")
    if ours and not storage.exists(folder.success):
        raise JobError(f"images: {job.images} is not finished, it has no _SUCCESS; run its job again, then this one")
    if not ours and not job.manifest:
        raise JobError(
            f"images: {job.images} has no plan.json, so it is no OUTPUT of a generate job; "
            "name in `manifest:` what its pictures were made from"
        )
    made = list(of_output(folder)) if ours else []
    if job.manifest:
        files = expand(job.manifests, storage)
        pairs = list(_joined(job, storage, files, _by_id(made) if ours else _Folder(folder.root, storage)))
        return pairs, allowed_prefixes(job.allow, files)
    return [_told_inline(pair) for pair in made], job.allow or folder.allow()


def of_output(output: Output) -> Iterator[Pair]:
    """What an OUTPUT's rows say, failed ones too."""
    base = output.base()
    for _, part in output.read_parts():
        for row in part.select([name for name in READ_COLUMNS if name in part.column_names]).to_pylist():
            lies_alone = row["file_name"] and ".tar/" not in row["file_name"]
            found = row["file_name"] if lies_alone else None if row["error_code"] else output.picture(row)
            picture = as_source(found, output.root)
            query, *contexts = (_source(uri, base) for uri in (row[QUERY], *(row[CONTEXT] or [])))
            error = (row["error_code"], row["error_message"]) if row["error_code"] else None
            yield Pair(row[ID], row["index"], picture, query, contexts, row[PROMPT], row["fit"], error)


def _source(uri: str | None, base: str) -> ImageSource:
    return {"bytes": None, "path": uri if uri is None or uri == INLINE else resolve(uri, base)}


def _told_inline(pair: Pair) -> Pair:
    if pair.error or INLINE not in [source["path"] for source in (pair.query, *pair.contexts)]:
        return pair
    message = "query or context were bytes in the manifest, OUTPUT does not hold them: name the manifest in `manifest:`"
    return replace(pair, error=(str(ErrorCode.MISSING_FILE), message))


Pictures = dict[str, list[Pair]]


def _by_id(made: list[Pair]) -> Pictures:
    pictures: Pictures = {}
    for pair in made:
        pictures.setdefault(pair.id, []).append(pair)
    return pictures


class _Folder:
    """The pictures of a folder by their names without the ending."""

    def __init__(self, root: str, storage: Storage) -> None:
        self.root = root
        names = [name for name in storage.list(root) if name.lower().endswith(ENDINGS)]
        self.names = {name.rsplit(".", 1)[0]: name for name in sorted(names, reverse=True)}

    def find(self, row: str, named: object) -> ImageSource | None:
        return as_source(named, self.root) or as_source(self.names.get(row), self.root)


def _joined(job: EvaluateJob, storage: Storage, files: list[str], pictures: Pictures | _Folder) -> Iterator[Pair]:
    """The manifest's rows, each with its picture, or with the pictures that OUTPUT has of it."""
    seen: set[str] = set()
    for uri in files:
        for raw, pair in _of_manifest(job, storage, uri):
            if pair.id in seen:
                raise ManifestError(f"{uri}: the id {pair.id!r} stands more than once in the manifest")
            seen.add(pair.id)
            if isinstance(pictures, _Folder):
                named = raw.get(job.columns.get("image", "image")) or raw.get("file_name")
                yield _shown(pair, pictures.find(pair.id, named), f"{pictures.root}/{pair.id}.png, .jpg, ...")
            elif pair.id in pictures:
                yield from (replace(pair, index=p.index, picture=p.picture, fit=p.fit, error=p.error) for p in pictures[pair.id])
            else:
                yield _shown(pair, None, f"a row {pair.id!r} in {job.images}")
    if not seen:
        raise ManifestError(f"{', '.join(files)}: the manifest has no rows")


def _shown(pair: Pair, picture: ImageSource | None, where: str) -> Pair:
    error = None if picture else (str(ErrorCode.MISSING_FILE), f"there is no {where}")
    return replace(pair, picture=picture, error=pair.error or error)


def _of_manifest(job: EvaluateJob, storage: Storage, uri: str) -> Iterator[tuple[Row, Pair]]:
    """The raw rows of a file, each with what it says of sources and prompt; row settings do not matter here."""
    file = open_file(uri, storage)
    names = {name: job.columns.get(name, name) for name in (ID, QUERY, CONTEXT, PROMPT)}
    rules = RowRules(limits=job.limits)
    for number, raw in enumerate(raw_rows(file, storage)):
        missing = [theirs for theirs in (names[QUERY], names[CONTEXT], *job.columns.values()) if theirs not in raw]
        if missing and number == 0:
            raise ManifestError(f"{uri}: the column(s) {', '.join(missing)} are missing; there are {', '.join(raw)}")
        plain = {name: raw.get(names[name]) for name in (QUERY, CONTEXT, PROMPT)} | {ID: row_id(raw, names)}
        [row] = read_table([plain], 0, rules, parent(uri), pa.schema([])).to_pylist()
        error = (row["error_code"], row["error_message"]) if row["error_code"] else None
        reference = as_source(raw.get(job.columns.get("reference", "")), parent(uri))
        yield raw, Pair(row[ID], 0, None, row[QUERY] or NOWHERE, row[CONTEXT] or [], row[PROMPT], job.fit, error, reference)
