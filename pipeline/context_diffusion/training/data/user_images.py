"""One's own pictures for fine-tuning: a folder with a sub-folder for each style, or a manifest. No torch.

Which pictures may be shown with which is settled here; pictures that cannot be read are left out and told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.errors import ErrorCode, ManifestError, RowError
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import CONTEXT, PROMPT, QUERY, TARGET
from context_diffusion.core.training_job import FinetuneJob
from context_diffusion.core.uris import normal, parent
from context_diffusion.inputs.decode import decode_resized
from context_diffusion.inputs.image_sources import ImageSource, as_source, as_sources, read_bytes
from context_diffusion.inputs.manifest_files import FORMATS, Row, expand, open_file, raw_rows
from context_diffusion.storage.filesystem import Storage


@dataclass(frozen=True)
class Example:
    """What may be asked of the model: indices of pictures. contexts: those that it may be shown, never the target."""

    target: int
    contexts: NDArray[np.int64]
    query: int | None = None  # left out: made from the target
    prompt: str = ""


@dataclass
class Pictures:
    """pixels: uint8 (size, size, 3) each. skipped: what could not be read -> why."""

    pixels: list[Pixels] = field(default_factory=list)
    training: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    styles: int = 0

    @property
    def digest(self) -> str:
        """Of the pictures and of what may be asked of them."""
        digest = hashlib.sha256()
        for pixels in self.pixels:
            digest.update(pixels.tobytes())
        for one in (*self.training, *self.validation):
            digest.update(f"{one.target} {one.contexts.tolist()} {one.query} {one.prompt}\n".encode())
        return digest.hexdigest()[:16]


class _Reader:
    """Sources -> indices into `found.pixels`, a picture only once: copies of a file under two names are one picture, so
    that a target is never shown beside its copy."""

    def __init__(self, job: FinetuneJob, size: int, found: Pictures) -> None:
        self.storage, self.allow, self.size, self.found = Storage(job.storage_options), job.allow, size, found
        self._by_path: dict[str, int | None] = {}
        self._by_digest: dict[bytes, int] = {}

    def __call__(self, source: ImageSource, name: str, allow: list[str]) -> int | None:
        """None where it cannot be read. name: what a picture without a path is called. Raises StorageError."""
        path, by_path = source["path"], source["bytes"] is None
        if by_path and path in self._by_path:
            return self._by_path[path]
        index = None
        try:
            data = read_bytes(source, allow, Limits(), self.storage)
            pixels = decode_resized(data, Limits(), path or name, lambda *_: (self.size, self.size), "crop")
            digest = hashlib.sha256(pixels.tobytes()).digest()
            index = self._by_digest.setdefault(digest, len(self.found.pixels))
            if index == len(self.found.pixels):
                self.found.pixels.append(pixels)
        except RowError as error:
            self.found.skipped[path or name] = str(error)
        if by_path:
            self._by_path[path] = index
        return index


def read_pictures(job: FinetuneJob, size: int) -> Pictures:
    """Reads job.data, cropped to squares of `size` pixels. Raises ManifestError where there is too little."""
    found = Pictures()
    reader = _Reader(job, size, found)
    if reader.storage.is_folder(job.data):
        _read_folder(job, reader)
    else:
        _read_manifest(job, reader)
    return found


def _read_folder(job: FinetuneJob, read: _Reader) -> None:
    root, storage, found, few = normal(job.data), read.storage, read.found, []
    names = [name for name in sorted(storage.list(root)) if not name.startswith(".")]
    styles = [name for name in names if storage.is_folder(f"{root}/{name}")]
    if not styles:
        hint = next((f"; or did you mean the manifest {root}/{n}?" for n in names if n.endswith(tuple(FORMATS))), "")
        raise ManifestError(f"data: {root} has no sub-folders; each style's pictures stand in one of their own{hint}")
    for style in styles:
        files = [uri for uri in storage.files(f"{root}/{style}") if not uri.rsplit("/", 1)[-1].startswith(".")]
        read_ones = {index: None for uri in files if (index := read({"bytes": None, "path": uri}, uri, [root])) is not None}
        if len(read_ones) < 2:
            few.append(f"{style} ({len(read_ones)} of {len(files)} files)")
            continue
        members = np.random.default_rng(job.seed).permutation(list(read_ones))
        held = min(int(len(members) * job.held_out), len(members) - 2)
        shown = members[held:]
        found.validation += [Example(int(target), shown) for target in members[:held]]
        found.training += [Example(int(target), shown[shown != target]) for target in shown]
    found.styles = len(styles)
    if few:
        reasons = "".join(f"\n  {reason}" for reason in list(found.skipped.values())[:10])
        raise ManifestError(
            f"data: a style needs two different pictures that can be read, for one shows the other's style: {root} has fewer "
            f"in {', '.join(few)}. Add pictures or remove the folder{reasons}"
        )


def _read_manifest(job: FinetuneJob, read: _Reader) -> None:
    found, examples, count = read.found, [], 0
    for name, base, row in _rows(job, read.storage):
        count += 1
        try:
            examples.append(_example(row, name, base, job, read))
        except RowError as error:
            found.skipped[name] = str(error)
    if not examples:
        reasons = "".join(f"\n  {reason}" for reason in list(found.skipped.values())[:10])
        raise ManifestError(f"data: none of the {count} rows of {job.data} can be trained on{reasons}")
    order = np.random.default_rng(job.seed).permutation(len(examples))
    held = min(int(len(examples) * job.held_out), len(examples) - 1)
    found.validation = [examples[i] for i in order[:held]]
    found.training = [examples[i] for i in order[held:]]


def _rows(job: FinetuneJob, storage: Storage) -> Iterator[tuple[str, str, Row]]:
    """(the row's name, its manifest's folder, the row)"""
    needed = [job.columns.get(name, name) for name in (TARGET, CONTEXT)]
    for uri in expand([job.data], storage):
        file = open_file(uri, storage)
        if missing := [name for name in needed if file.columns and name not in file.columns]:
            raise ManifestError(
                f"{uri}: no column {', '.join(missing)} among {', '.join(file.columns)}; `columns: {{{TARGET}: NAME}}` renames"
            )
        for number, row in enumerate(raw_rows(file, storage), 1):
            yield f"{uri}: row {number}", parent(uri), row


def _example(row: Row, name: str, base: str, job: FinetuneJob, read: _Reader) -> Example:
    """Raises RowError for a row that cannot be trained on."""
    cells = {column: row.get(job.columns.get(column, column)) for column in (TARGET, CONTEXT, QUERY, PROMPT)}
    allow = job.allow or [base]

    def index(column: str) -> int | None:
        source = as_source(cells[column], base)
        return None if source is None else read(source, f"{name}: {column}", allow)

    target = index(TARGET)
    if target is None:
        raise RowError(ErrorCode.MISSING_FILE, f"{name}: no readable {TARGET}")
    shown = [read(source, f"{name}: {CONTEXT} {k}", allow) for k, source in enumerate(as_sources(cells[CONTEXT], base), 1)]
    contexts = [one for one in dict.fromkeys(shown) if one is not None and one != target]
    if not contexts:
        raise RowError(ErrorCode.NO_CONTEXT, f"{name}: no readable {CONTEXT} beside the {TARGET} itself")
    query = index(QUERY)
    if query is None and cells[QUERY]:
        raise RowError(ErrorCode.NO_QUERY, f"{name}: its {QUERY} cannot be read")
    return Example(target, np.array(contexts), query, str(cells[PROMPT] or ""))
