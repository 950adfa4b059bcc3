"""What an image was generated from, by its own metadata or by the OUTPUT that it lies in. Generates no
pixels.

An image outside of an OUTPUT is not trusted: the user names what may be read, and a model that is not one of
the named ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import JobError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Limits
from context_diffusion.core.model_parts import PRESETS
from context_diffusion.core.records import is_derived
from context_diffusion.core.schema import (
    ID,
    NEGATIVE_PROMPT,
    OUTPUT,
    PROMPT,
    QUERY,
    READ,
    SOURCE_LISTS,
)
from context_diffusion.core.uris import normal, parent
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.inputs.image_sources import INLINE
from context_diffusion.inputs.manifest_files import ManifestFile
from context_diffusion.inputs.rows import RowRules
from context_diffusion.models.resolution.resolve import ResolvedModel, find_model
from context_diffusion.outputs.image_metadata import (
    Metadata,
    metadata_in,
    metadata_of_row,
    model_parts_of,
    settings_of,
    sources_of,
)
from context_diffusion.outputs.output_folder import Output, base_of
from context_diffusion.storage.filesystem import Storage


@dataclass(frozen=True)
class ImageOrigin:
    """An image file and its metadata. output, record: the OUTPUT that it lies in, and that one's
    plan.json."""

    uri: str
    data: bytes
    metadata: Metadata
    output: Output | None = None
    record: Any = None

    @property
    def base(self) -> str:
        """The folder of relative sources: the manifest's, or without an OUTPUT the image's own."""
        return base_of(self.record) if self.record else parent(self.uri)

    @property
    def planned(self) -> GenerateJob | None:
        """The job of its OUTPUT."""
        return GenerateJob.model_validate(self.record["job"]) if self.record else None

    @property
    def shard(self) -> int:
        """The number in the name of its folder, images/part-N."""
        return int(parent(self.uri).rsplit("-", 1)[1])


def find_origin(file: str) -> ImageOrigin:
    """Read an image file and find its metadata. Raises JobError where there is none, StorageError."""
    uri, storage = normal(file), Storage()
    try:
        data = storage.read_input(uri, Limits().max_bytes)
    except RowError as error:
        raise JobError(error.message) from error
    metadata, output = metadata_in(data, file), _output_of(uri, storage)
    origin = ImageOrigin(uri, data, metadata, output, output.read_plan() if output else None)
    row = _row(origin)
    if metadata and row and row[ID] != metadata[ID]:
        raise JobError(
            f"{file}: its metadata names the row {metadata[ID]!r}, but its OUTPUT names {row[ID]!r}"
        )
    metadata = (metadata_of_row(row, origin.record) if row else {}) | metadata
    if metadata:
        return replace(origin, metadata=metadata)
    hint = (
        "an image generated with `metadata: false` can be reproduced where it lies in its OUTPUT, "
        "images/part-N/"
    )
    raise JobError(f"{file}: the image has no metadata of its generation; {hint}")


def _output_of(uri: str, storage: Storage) -> Output | None:
    """Return the OUTPUT whose images/part-N/ the image lies in."""
    if not re.search(r"/images/part-\d+/[^/]+$", uri):
        return None
    output = Output(parent(parent(parent(uri))), storage)
    return output if storage.exists(output.plan) else None


def _row(origin: ImageOrigin) -> dict[str, Any] | None:
    """Return the image's row of OUTPUT, if there is one."""
    output = origin.output
    if output is None or not output.storage.exists(output.part(origin.shard)):
        return None
    name = origin.uri.removeprefix(f"{output.root}/")
    rows = output.read_part(origin.shard, OUTPUT.names).to_pylist()
    return next((row for row in rows if row["file_name"] == name), None)


def model_of(origin: ImageOrigin, model: str | None) -> ResolvedModel:
    """Resolve the image's model, or the one that the user names. Raises JobError, ModelError."""
    name = str(origin.metadata.get("model", "")).rpartition("@")[0]
    if model and model != name:
        return find_model(model)
    if origin.planned:
        return find_model(origin.planned.model, origin.record["model"]["commits"])
    if name in ("bundled", *PRESETS):
        return find_model(name)
    if model:
        return find_model(model_parts_of(origin.metadata, origin.uri) or name)
    raise JobError(
        f"{origin.uri} names the model {name!r}: if you trust it, load it by --model {name!r}, or name "
        "another one"
    )


def allowed(origin: ImageOrigin, base: str | None) -> list[str]:
    """Return the URI prefixes that may be read: the user's folder, the job's, or the image's own folder."""
    if base:
        return [base]
    return list(origin.record["allow"]) if origin.record else [parent(origin.uri)]


def read_row(origin: ImageOrigin, base: str | None, storage: Storage) -> dict[str, Any]:
    """Return the one image as a row of the READ table. base: the user's folder of relative sources. Raises
    JobError."""
    metadata = origin.metadata
    row = dict.fromkeys(READ.names) | {
        "shard": 0,
        ID: metadata[ID],
        **sources_of(metadata, base or origin.base),
    }
    row |= {name: metadata.get(name) for name in (PROMPT, NEGATIVE_PROMPT)}
    row["settings"] = settings_of(metadata, origin.uri).model_dump_json()
    uris = {
        QUERY: [metadata[QUERY]],
        **{name: metadata.get(name, []) for name in SOURCE_LISTS},
    }
    if inline := [name for name, listed in uris.items() if INLINE in listed]:
        planned = _manifest_row(origin, storage)
        row |= {name: planned[name] for name in inline}
    return row


def _manifest_row(origin: ImageOrigin, storage: Storage) -> dict[str, Any]:
    """Read the image's row from the manifest, for sources that are bytes there. Raises JobError."""
    output = origin.output
    if output is None or origin.planned is None:
        raise JobError(
            f"{origin.uri}: its sources are bytes in the manifest; reproduce it where it lies in its OUTPUT"
        )
    rules = RowRules.of_job(origin.planned)
    for number, file in enumerate(origin.record["manifest"]):
        for shard in read_shards(output, number):
            if shard.number == origin.shard:
                manifest = ManifestFile(file["uri"], file["format"], file["columns"], file["groups"])
                [table] = ReadShard(rules, manifest, shard, pa.schema([]), storage)()
                ids = output.ids(shard.number)  # a corrected row keeps the id that was derived before
                for row, planned_id in zip(table.to_pylist(), ids, strict=False):
                    if origin.metadata[ID] in (row[ID], planned_id if is_derived(row[ID]) else None):
                        return dict(row)
                raise JobError(
                    f"{file['uri']} has no row {origin.metadata[ID]!r} any more, and it held the "
                    "row's sources"
                )
    raise JobError(f"{output.root}: the plan has no shard {origin.shard}")
