"""Collects what is scored: each finished image with its query, contexts and prompt, as undecoded sources.

Images lie in an OUTPUT or in any folder; their inputs come from a manifest or from OUTPUT's rows. All pairs
are held in memory, with the bytes of images that are stored in Parquet files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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

NO_SOURCE: ImageSource = {"bytes": None, "path": None}  # the query of a row with an error
READ_COLUMNS = (
    ID,
    "index",
    "error_code",
    "error_message",
    "file_name",
    "image",
    QUERY,
    CONTEXT,
    PROMPT,
    "fit",
)


@dataclass(frozen=True)
class Pair:
    """An image and its inputs.

    error: code and message of a row that cannot be scored; reference: the image in the manifest's column
    `reference`.
    """

    id: str
    index: int
    image: ImageSource | None
    query: ImageSource
    contexts: list[ImageSource]
    prompt: str | None
    fit: Fit
    error: tuple[str, str] | None = None
    reference: ImageSource | None = None


def source_key(source: ImageSource) -> str:
    """Return what identifies a source: its path, or a hash of its bytes."""
    if source["bytes"] is None:
        return source["path"]
    return hashlib.blake2b(source["bytes"], digest_size=16).hexdigest()


def scored_images(pairs: Iterable[Pair]) -> list[ImageSource]:
    """Return the images of the pairs that can be scored."""
    return [pair.image for pair in pairs if pair.image and not pair.error]


def find_pairs(job: EvaluateJob, storage: Storage) -> tuple[list[Pair], list[str]]:
    """Return the pairs and the allowed URI prefixes of their sources. Raises JobError, ManifestError."""
    folder = Output(normal(job.images), storage)
    is_output = storage.exists(folder.plan)
    _check_images(job, folder, is_output)
    if job.manifest:
        files = expand(job.manifests, storage)
        images: PairsById | _ImageFolder = _ImageFolder(folder.root, storage)
        if is_output:
            images = _by_id(pairs_of_output(folder))
        return list(_pairs_of_manifest(job, storage, files, images)), allowed_prefixes(job.allow, files)
    pairs = [_with_inline_error(pair) for pair in pairs_of_output(folder)]
    return pairs, job.allow or folder.allow()


def _check_images(job: EvaluateJob, folder: Output, is_output: bool) -> None:
    """Raise JobError if the images are neither a finished OUTPUT nor a folder with a manifest."""
    if not is_output and not folder.storage.is_folder(folder.root):
        raise JobError(f"images: folder not found: {job.images}")
    if is_output and not folder.storage.exists(folder.success):
        raise JobError(
            f"images: {job.images} is not finished: it has no _SUCCESS; rerun its job, then this one"
        )
    if not is_output and not job.manifest:
        raise JobError(
            f"images: {job.images} has no plan.json, so it is not the OUTPUT of a generate job; "
            "set `manifest:` to the manifest of its images"
        )


def pairs_of_output(output: Output) -> Iterator[Pair]:
    """Yield a pair for each row of an OUTPUT, failed rows included."""
    base = output.base()
    for _, part in output.read_parts():
        names = [name for name in READ_COLUMNS if name in part.column_names]
        for row in part.select(names).to_pylist():
            error = (row["error_code"], row["error_message"]) if row["error_code"] else None
            image = as_source(_stored_image(output, row), output.root)
            query = _source(row[QUERY], base)
            contexts = [_source(uri, base) for uri in row[CONTEXT] or []]
            yield Pair(row[ID], row["index"], image, query, contexts, row[PROMPT], row["fit"], error)


def _stored_image(output: Output, row: Row) -> str | bytes | None:
    """Return the file name of an image that is a file of its own, else its bytes; None for a failed row."""
    if row["file_name"] and ".tar/" not in row["file_name"]:
        return str(row["file_name"])
    return None if row["error_code"] else output.image(row)


def _source(uri: str | None, base: str) -> ImageSource:
    return {"bytes": None, "path": uri if uri is None or uri == INLINE else resolve(uri, base)}


def _with_inline_error(pair: Pair) -> Pair:
    """Add an error to a pair whose query or contexts were inline in the manifest."""
    if pair.error or INLINE not in [source["path"] for source in (pair.query, *pair.contexts)]:
        return pair
    message = (
        "query or context were inline in the manifest, and OUTPUT does not contain them: set `manifest:`"
    )
    return replace(pair, error=(str(ErrorCode.MISSING_FILE), message))


PairsById = dict[str, list[Pair]]


def _by_id(pairs: Iterable[Pair]) -> PairsById:
    by_id: PairsById = {}
    for pair in pairs:
        by_id.setdefault(pair.id, []).append(pair)
    return by_id


class _ImageFolder:
    """The images of a folder, by their names without the extension."""

    def __init__(self, root: str, storage: Storage) -> None:
        self.root = root
        names = [name for name in storage.list(root) if name.lower().endswith(ENDINGS)]
        self.names = {name.rsplit(".", 1)[0]: name for name in sorted(names, reverse=True)}

    def find(self, row_id: str, file_name: object) -> ImageSource | None:
        """Return the image with this file name, or if there is none, with the row's id as its name."""
        return as_source(file_name, self.root) or as_source(self.names.get(row_id), self.root)


def _pairs_of_manifest(
    job: EvaluateJob, storage: Storage, files: list[str], images: PairsById | _ImageFolder
) -> Iterator[Pair]:
    """Yield the manifest's rows, each with its image in the folder or its images in OUTPUT."""
    seen: set[str] = set()
    for uri in files:
        for raw, pair in _read_manifest(job, storage, uri):
            if pair.id in seen:
                raise ManifestError(f"{uri}: duplicate id {pair.id!r} in the manifest")
            seen.add(pair.id)
            if isinstance(images, _ImageFolder):
                file_name = raw.get(job.columns.get("image", "image")) or raw.get("file_name")
                image = images.find(pair.id, file_name)
                yield _with_image(pair, image, f"{images.root}/{pair.id}.png, .jpg, ...")
            elif pair.id in images:
                for stored in images[pair.id]:
                    yield replace(
                        pair, index=stored.index, image=stored.image, fit=stored.fit, error=stored.error
                    )
            else:
                yield _with_image(pair, None, f"row {pair.id!r} in {job.images}")
    if not seen:
        raise ManifestError(f"{', '.join(files)}: the manifest has no rows")


def _with_image(pair: Pair, image: ImageSource | None, where: str) -> Pair:
    error = None if image else (str(ErrorCode.MISSING_FILE), f"not found: {where}")
    return replace(pair, image=image, error=pair.error or error)


def _read_manifest(job: EvaluateJob, storage: Storage, uri: str) -> Iterator[tuple[Row, Pair]]:
    """Yield the raw rows of a manifest file, each with its pair without an image.

    Settings of rows are ignored.
    """
    file = open_file(uri, storage)
    names = {name: job.columns.get(name, name) for name in (ID, QUERY, CONTEXT, PROMPT)}
    required_names = [names[QUERY], names[CONTEXT], *job.columns.values()]
    rules = RowRules(limits=job.limits)
    for number, raw in enumerate(raw_rows(file, storage)):
        missing = [name for name in dict.fromkeys(required_names) if name not in raw]
        if missing and number == 0:
            raise ManifestError(f"{uri}: missing columns: {', '.join(missing)}; it has {', '.join(raw)}")
        values = {name: raw.get(names[name]) for name in (QUERY, CONTEXT, PROMPT)} | {ID: row_id(raw, names)}
        [row] = read_table([values], 0, rules, parent(uri), pa.schema([])).to_pylist()
        error = (row["error_code"], row["error_message"]) if row["error_code"] else None
        reference = as_source(raw.get(job.columns.get("reference", "")), parent(uri))
        query = row[QUERY] or NO_SOURCE
        yield raw, Pair(row[ID], 0, None, query, row[CONTEXT] or [], row[PROMPT], job.fit, error, reference)
