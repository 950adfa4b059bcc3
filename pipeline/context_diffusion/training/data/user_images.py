"""A user's images for fine-tuning: a folder with a sub-folder for each style, or a manifest.

Decides which images may be contexts of which; images that cannot be read are skipped and reported. Knows no
torch."""

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
from context_diffusion.inputs.manifest_files import FORMATS, expand, open_file, raw_rows
from context_diffusion.inputs.text_rows import Row
from context_diffusion.storage.filesystem import Storage


@dataclass(frozen=True)
class Example:
    """A training example, by indices of images. contexts: those that may be shown with the target, never
    itself."""

    target: int
    contexts: NDArray[np.int64]
    query: int | None = None  # None: made from the target
    prompt: str = ""


@dataclass
class UserImages:
    """A user's images and examples. pixels: uint8 (size, size, 3) each. skipped: why an image was not read,
    by its name."""

    pixels: list[Pixels] = field(default_factory=list)
    training: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    styles: int = 0

    @property
    def digest(self) -> str:
        """A digest of the images and examples."""
        digest = hashlib.sha256()
        for pixels in self.pixels:
            digest.update(pixels.tobytes())
        for example in (*self.training, *self.validation):
            fields = f"{example.target} {example.contexts.tolist()} {example.query} {example.prompt}\n"
            digest.update(fields.encode())
        return digest.hexdigest()[:16]


class _Reader:
    """Read sources into `images.pixels`, equal images once, so that a target is never shown with its
    copy."""

    def __init__(self, job: FinetuneJob, size: int, images: UserImages) -> None:
        self.storage = Storage(job.storage_options)
        self.allow = job.allow
        self.size = size
        self.images = images
        self._by_path: dict[str, int | None] = {}
        self._by_digest: dict[bytes, int] = {}

    def __call__(self, source: ImageSource, name: str, allow: list[str]) -> int | None:
        """Return the index of an image; None: it cannot be read. name: of an image without a path. Raises
        StorageError."""
        path = source["path"]
        by_path = source["bytes"] is None
        if by_path and path in self._by_path:
            return self._by_path[path]
        index = None
        try:
            data = read_bytes(source, allow, Limits(), self.storage)
            pixels = decode_resized(data, Limits(), path or name, lambda *_: (self.size, self.size), "crop")
            digest = hashlib.sha256(pixels.tobytes()).digest()
            index = self._by_digest.setdefault(digest, len(self.images.pixels))
            if index == len(self.images.pixels):
                self.images.pixels.append(pixels)
        except RowError as error:
            self.images.skipped[path or name] = str(error)
        if by_path:
            self._by_path[path] = index
        return index


def read_user_images(job: FinetuneJob, size: int) -> UserImages:
    """Read job.data, cropped to squares of `size` pixels. Raises ManifestError if there are too few
    images."""
    images = UserImages()
    reader = _Reader(job, size, images)
    if reader.storage.is_folder(job.data):
        _read_folder(job, reader)
    else:
        _read_manifest(job, reader)
    return images


def _read_folder(job: FinetuneJob, read: _Reader) -> None:
    root = normal(job.data)
    storage = read.storage
    images = read.images
    few = []
    names = [name for name in sorted(storage.list(root)) if not name.startswith(".")]
    styles = [name for name in names if storage.is_folder(f"{root}/{name}")]
    if not styles:
        manifest = next((name for name in names if name.endswith(tuple(FORMATS))), None)
        hint = f", or did you mean the manifest {root}/{manifest}?" if manifest else ""
        raise ManifestError(f"data: {root} has no sub-folders; put the images of each style into one{hint}")
    for style in styles:
        files = [
            uri for uri in storage.files(f"{root}/{style}") if not uri.rsplit("/", 1)[-1].startswith(".")
        ]
        indices = [read({"bytes": None, "path": uri}, uri, [root]) for uri in files]
        readable = list(dict.fromkeys(index for index in indices if index is not None))
        if len(readable) < 2:
            few.append(f"{style} ({len(readable)} of {len(files)} files)")
            continue
        members = np.random.default_rng(job.seed).permutation(readable)
        held = min(int(len(members) * job.held_out), len(members) - 2)
        trained = members[held:]
        images.validation += [Example(int(target), trained) for target in members[:held]]
        images.training += [Example(int(target), trained[trained != target]) for target in trained]
    images.styles = len(styles)
    if few:
        reasons = "".join(f"\n  {reason}" for reason in list(images.skipped.values())[:10])
        raise ManifestError(
            "data: a style needs at least two different readable images, since one shows the style of the "
            f"other; {root} has fewer in {', '.join(few)}. Add images or remove the folder{reasons}"
        )


def _read_manifest(job: FinetuneJob, read: _Reader) -> None:
    images = read.images
    examples = []
    count = 0
    for name, base, row in _rows(job, read.storage):
        count += 1
        try:
            examples.append(_example(row, name, base, job, read))
        except RowError as error:
            images.skipped[name] = str(error)
    if not examples:
        reasons = "".join(f"\n  {reason}" for reason in list(images.skipped.values())[:10])
        raise ManifestError(f"data: none of the {count} rows of {job.data} can be trained on{reasons}")
    order = np.random.default_rng(job.seed).permutation(len(examples))
    held = min(int(len(examples) * job.held_out), len(examples) - 1)
    images.validation = [examples[i] for i in order[:held]]
    images.training = [examples[i] for i in order[held:]]


def _rows(job: FinetuneJob, storage: Storage) -> Iterator[tuple[str, str, Row]]:
    """Yield each row as (its name, its manifest's folder, the row)."""
    needed = [job.columns.get(name, name) for name in (TARGET, CONTEXT)]
    for uri in expand([job.data], storage):
        file = open_file(uri, storage)
        if missing := [name for name in needed if file.columns and name not in file.columns]:
            raise ManifestError(
                f"{uri}: no column {', '.join(missing)} among {', '.join(file.columns)}; `columns: "
                f"{{{TARGET}: NAME}}` renames"
            )
        for number, row in enumerate(raw_rows(file, storage), 1):
            yield f"{uri}: row {number}", parent(uri), row


def _example(row: Row, name: str, base: str, job: FinetuneJob, read: _Reader) -> Example:
    """Read a row. Raises RowError if it cannot be trained on."""
    cells = {column: row.get(job.columns.get(column, column)) for column in (TARGET, CONTEXT, QUERY, PROMPT)}
    allow = job.allow or [base]

    def index(column: str) -> int | None:
        source = as_source(cells[column], base)
        return None if source is None else read(source, f"{name}: {column}", allow)

    target = index(TARGET)
    if target is None:
        raise RowError(ErrorCode.MISSING_FILE, f"{name}: no readable {TARGET}")
    sources = as_sources(cells[CONTEXT], base)
    indices = [read(source, f"{name}: {CONTEXT} {number}", allow) for number, source in enumerate(sources, 1)]
    contexts = [image for image in dict.fromkeys(indices) if image is not None and image != target]
    if not contexts:
        raise RowError(ErrorCode.NO_CONTEXT, f"{name}: no readable {CONTEXT} beside the {TARGET} itself")
    query = index(QUERY)
    if query is None and cells[QUERY]:
        raise RowError(ErrorCode.NO_QUERY, f"{name}: its {QUERY} cannot be read")
    return Example(target, np.array(contexts), query, str(cells[PROMPT] or ""))
