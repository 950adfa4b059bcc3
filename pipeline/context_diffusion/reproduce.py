"""A picture once more, from what it or its OUTPUT says, in this process; and what differs. No Ray.

Sources come through the job's own stage (LoadImages) and its `allow:`. A picture that lies in no OUTPUT is trusted with
nothing: what it may read, and which model it may load of those that have no name of ours, the user says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from context_diffusion.config import GenerateJob, Limits
from context_diffusion.encoding import encode_image
from context_diffusion.errors import ErrorCode, JobError, RowError
from context_diffusion.images import decode_image, format_of
from context_diffusion.making import Maker
from context_diffusion.manifest import ManifestFile
from context_diffusion.model.presets import PRESETS
from context_diffusion.model.source import Source as Model
from context_diffusion.model.source import find_model
from context_diffusion.output import Output
from context_diffusion.plan import read_shards
from context_diffusion.recipe import Told, differing, job_of, metadata_of, parts_of, settings_of, sources_of, told_by, told_in
from context_diffusion.schema import ID, NEGATIVE_PROMPT, PROMPT, READ, Failure, Pixels, Result
from context_diffusion.stages import LoadImages, ReadShard, requests_of
from context_diffusion.storage import Storage, normal, parent

ENDINGS: dict[str, Literal["png", "webp", "jpeg"]] = {"png": "png", "webp": "webp", "jpg": "jpeg", "jpeg": "jpeg"}


@dataclass(frozen=True)
class Found:
    """A picture's file and what it says of itself. output, record: the OUTPUT that it lies in, and its plan.json."""

    uri: str
    data: bytes
    told: Told
    output: Output | None = None
    record: Any = None

    @property
    def planned(self) -> GenerateJob | None:
        return GenerateJob.model_validate(self.record["job"]) if self.record else None

    @property
    def shard(self) -> int:
        return int(parent(self.uri).rsplit("-", 1)[1])


@dataclass(frozen=True)
class Again:
    """metadata: the texts of the new picture. differs: what is other than then, a line each."""

    image: Pixels
    metadata: dict[str, str]
    device: str
    identical: bool
    differs: list[str]


def find(file: str) -> Found:
    """Raises JobError where nothing says what made it, StorageError."""
    uri, storage = normal(file), Storage()
    try:
        data = storage.read_input(uri, Limits().max_bytes)
    except RowError as error:
        raise JobError(error.message) from error
    told, folder = told_in(data, file), parent(parent(uri))
    output = Output(parent(folder), storage)
    if not folder.endswith("/images") or not storage.exists(output.plan):
        if told:
            return Found(uri, data, told)
        hint = "a picture that was made with `metadata: false` is known where it lies in its OUTPUT, images/part-N/"
        raise JobError(f"{file}: nothing in it says how it was made; {hint}")
    found = Found(uri, data, told, output, output.read_json(output.plan))
    row = _row(found)
    if told and row[ID] != told[ID]:
        raise JobError(f"{file}: it says that it is row {told[ID]!r}, OUTPUT has row {row[ID]!r} there: which is right?")
    return Found(uri, data, told_by(row, found.record) | told, output, found.record)


def _row(found: Found) -> dict[str, Any]:
    """Its row of OUTPUT. Raises JobError."""
    assert found.output
    name = found.uri.removeprefix(f"{found.output.root}/")
    for row in found.output.read_part(found.shard).to_pylist():
        if row["file_name"] == name:
            return row
    raise JobError(f"{found.uri}: {found.output.part(found.shard)} has no row of it")


def make_again(found: Found, allow: list[str], model: str | None) -> Again:
    """allow, model: the user's word, in place of that of OUTPUT's job. Raises JobError where it cannot be made."""
    told, source = found.told, _model(found, model)
    job = job_of(told, found.uri, source.parts or str(source.folder), found.planned)
    storage = Storage(job.storage_options)
    load = LoadImages(job, allow or _allowed(found), source.image_size, source.context_size, storage)
    table = load(pa.Table.from_pylist([_read(found, job, storage)], READ))
    [loaded] = table.to_pylist()
    if loaded["error_code"]:
        hint = "; --allow PREFIX permits it" if loaded["error_code"] == ErrorCode.FORBIDDEN_URI else ""
        raise JobError(f"{found.uri} cannot be made: {loaded['error_code']}: {loaded['error_message']}{hint}")
    result = _generate(table, job, source, told.get("device"))
    now = told | {"model": f"{source.name}@{source.revision}", "device": result.device}
    metadata = metadata_of(now, loaded, job)
    as_file = decode_image(encode_image(result.image, format_of(found.data), metadata), Limits(), "the picture made now")
    pixels = _pixels(decode_image(found.data, Limits(), found.uri), as_file)
    differs = [*differing(told, metadata), *pixels]
    kept = metadata if not found.planned or found.planned.metadata else {}
    return Again(result.image, kept, result.device, not pixels, differs)


def _model(found: Found, given: str | None) -> Model:
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


def _allowed(found: Found) -> list[str]:
    """What the job let its rows read; of a picture alone, its own folder."""
    if not found.planned:
        return [parent(found.uri)]
    return found.planned.allow or [parent(file["uri"]) for file in found.record["manifest"]]


def _read(found: Found, job: GenerateJob, storage: Storage) -> dict[str, Any]:
    """The one image as a row of the table that LoadImages takes. Raises JobError."""
    told = found.told
    row = dict.fromkeys(READ.names) | {"shard": 0, ID: told[ID], **sources_of(told)}
    row |= {name: told.get(name) for name in (PROMPT, NEGATIVE_PROMPT)}
    row["settings"] = settings_of(told, found.uri).model_dump_json()
    inline = [name for name, value in sources_of(told).items() if _inline(value)]
    if inline:
        planned = _of_manifest(found, storage)
        row |= {name: planned[name] for name in inline}
    return row


def _inline(value: Any) -> bool:
    """Was a source of these bytes in its manifest?"""
    return any(source["path"] == "inline" for source in (value if isinstance(value, list) else [value]) if source)


def _of_manifest(found: Found, storage: Storage) -> dict[str, Any]:
    """Its row as the job read it: where pictures lie in the manifest. Raises JobError."""
    if found.output is None or found.planned is None:
        raise JobError(f"{found.uri}: its sources were bytes in the manifest; it can be made where it lies in its OUTPUT")
    for number, file in enumerate(found.record["manifest"]):
        for shard in read_shards(found.output, number):
            if shard.number == found.shard:
                manifest = ManifestFile(file["uri"], file["format"], file["columns"], file["groups"])
                [table] = ReadShard(found.planned, manifest, shard, pa.schema([]), storage)()
                for row in table.to_pylist():
                    if row[ID] == found.told[ID]:
                        return row
                raise JobError(f"{file['uri']} has no row {found.told[ID]!r} any more, and its sources lay in it")
    raise JobError(f"{found.output.root}: no shard {found.shard} is planned")


def _generate(table: pa.Table, job: GenerateJob, model: Model, device: str | None) -> Result:
    [requests] = requests_of(table, job)
    [outcome] = Maker(job, model, "cpu" if device == "cpu" else None).make(requests)  # another kind where it is here
    if isinstance(outcome, Failure):
        raise JobError(f"{job.output} cannot be made: {outcome.code}: {outcome.message}")
    return outcome


def _pixels(then: Pixels, now: Pixels) -> list[str]:
    """How the pixels differ; nothing where they don't."""
    if then.shape != now.shape:
        return [f"size: {then.shape[1]} x {then.shape[0]} then, {now.shape[1]} x {now.shape[0]} now"]
    difference = abs(then.astype(int) - now)
    if not (most := difference.max()):
        return []
    share, mean = (difference.max(axis=2) > 0).mean(), difference.mean()
    return [f"pixels: {share:.2%} of them, by {most} of 255 at most, {mean:.3f} on average"]


def writer(output: str | None) -> Callable[[Again], None]:
    """What puts the new picture there, in the format of its ending. Raises JobError at once where it cannot."""
    if output is None:
        return lambda again: None
    uri, storage = normal(output), Storage()
    image_format = ENDINGS.get(uri.rsplit(".", 1)[-1].lower())
    if image_format is None:
        raise JobError(f"--output {output}: its name ends in one of .{', .'.join(ENDINGS)}")
    if storage.exists(uri):
        raise JobError(f"--output {output} is there already")

    def write(again: Again) -> None:
        if not storage.create(uri, encode_image(again.image, image_format, again.metadata)):
            raise JobError(f"--output {output} is there already")

    return write
