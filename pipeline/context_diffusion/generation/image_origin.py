"""A picture's file and what made it, as it says itself or as the OUTPUT that it lies in does. No pixels are made here.

A picture that lies in no OUTPUT is trusted with nothing: what it may read, and which model it may load of those that have
no name of ours, the user says.
"""

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
from context_diffusion.core.schema import CONTEXT, CONTROL_IMAGE, ID, NEGATIVE_PROMPT, OUTPUT, PROMPT, QUERY, READ
from context_diffusion.core.uris import normal, parent
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages import ReadShard
from context_diffusion.inputs.image_sources import INLINE
from context_diffusion.inputs.manifest_files import ManifestFile
from context_diffusion.models.resolve import ResolvedModel, find_model
from context_diffusion.outputs.image_metadata import Told, parts_of, settings_of, sources_of, told_by, told_in
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage


@dataclass(frozen=True)
class Found:
    """A picture's file and what it says of itself. output, record: the OUTPUT that it lies in, and its plan.json."""

    uri: str
    data: bytes
    told: Told
    output: Output | None = None
    record: Any = None

    @property
    def base(self) -> str:
        """Where its relative sources lie: beside the manifest; of a picture alone beside itself."""
        return self.output.base() if self.output else parent(self.uri)

    @property
    def planned(self) -> GenerateJob | None:
        return GenerateJob.model_validate(self.record["job"]) if self.record else None

    @property
    def shard(self) -> int:
        return int(parent(self.uri).rsplit("-", 1)[1])


def find(file: str) -> Found:
    """Raises JobError where nothing says what made it, StorageError."""
    uri, storage = normal(file), Storage()
    try:
        data = storage.read_input(uri, Limits().max_bytes)
    except RowError as error:
        raise JobError(error.message) from error
    told, output = told_in(data, file), _output_of(uri, storage)
    found = Found(uri, data, told, output, output.read_json(output.plan) if output else None)
    row = _row(found)
    if told and row and row[ID] != told[ID]:
        raise JobError(f"{file}: it says that it is row {told[ID]!r}, OUTPUT has row {row[ID]!r} there: which is right?")
    told = (told_by(row, found.record) if row else {}) | told
    if told:
        return replace(found, told=told)
    hint = "a picture that was made with `metadata: false` is known where it lies in its OUTPUT, images/part-N/"
    raise JobError(f"{file}: nothing in it says how it was made; {hint}")


def _output_of(uri: str, storage: Storage) -> Output | None:
    """The one in whose images/part-N/ it lies."""
    if not re.search(r"/images/part-\d+/[^/]+$", uri):
        return None
    output = Output(parent(parent(parent(uri))), storage)
    return output if storage.exists(output.plan) else None


def _row(found: Found) -> dict[str, Any] | None:
    """Its row of OUTPUT, where there is one."""
    if found.output is None or not found.output.storage.exists(found.output.part(found.shard)):
        return None
    name = found.uri.removeprefix(f"{found.output.root}/")
    return next((row for row in found.output.read_part(found.shard, OUTPUT.names).to_pylist() if row["file_name"] == name), None)


def model_of(found: Found, given: str | None) -> ResolvedModel:
    """Raises JobError, ModelError."""
    name = str(found.told.get("model", "")).rpartition("@")[0]
    if given and given != name:
        return find_model(given)
    if found.planned:
        return find_model(found.planned.model, found.record["model"]["commits"])
    if name in ("bundled", *PRESETS):
        return find_model(name)
    if given:
        return find_model(parts_of(found.told, found.uri) or name)
    raise JobError(f"{found.uri} names the model {name!r}: if you trust it, --model {name!r} loads it; or name another place")


def allowed(found: Found, base: str | None) -> list[str]:
    """What the job let its rows read, or the folder that the user names; of a picture alone, its own folder."""
    if base:
        return [base]
    if not found.planned:
        return [parent(found.uri)]
    return found.planned.allow or [parent(file["uri"]) for file in found.record["manifest"]]


def read_again(found: Found, base: str | None, storage: Storage) -> dict[str, Any]:
    """The one image as a row of the table that LoadImages takes. base: the user's word on where its relative sources lie.
    Raises JobError."""
    told = found.told
    row = dict.fromkeys(READ.names) | {"shard": 0, ID: told[ID], **sources_of(told, base or found.base)}
    row |= {name: told.get(name) for name in (PROMPT, NEGATIVE_PROMPT)}
    row["settings"] = settings_of(told, found.uri).model_dump_json()
    uris = {QUERY: [told[QUERY]], CONTEXT: told[CONTEXT], CONTROL_IMAGE: told.get(CONTROL_IMAGE, [])}
    if inline := [name for name, listed in uris.items() if INLINE in listed]:
        planned = _of_manifest(found, storage)
        row |= {name: planned[name] for name in inline}
    return row


def _of_manifest(found: Found, storage: Storage) -> dict[str, Any]:
    """Its row as the job read it: where pictures lie in the manifest. Raises JobError."""
    if found.output is None or found.planned is None:
        raise JobError(f"{found.uri}: its sources were bytes in the manifest; it can be made where it lies in its OUTPUT")
    for number, file in enumerate(found.record["manifest"]):
        for shard in read_shards(found.output, number):
            if shard.number == found.shard:
                manifest = ManifestFile(file["uri"], file["format"], file["columns"], file["groups"])
                [table] = ReadShard(found.planned, manifest, shard, pa.schema([]), storage)()
                planned = found.output.ids(shard.number)  # a corrected row keeps the id that was derived from the old one
                for row, before in zip(table.to_pylist(), planned, strict=False):
                    if found.told[ID] in (row[ID], before if is_derived(row[ID]) else None):
                        return dict(row)
                raise JobError(f"{file['uri']} has no row {found.told[ID]!r} any more, and its sources lay in it")
    raise JobError(f"{found.output.root}: no shard {found.shard} is planned")
