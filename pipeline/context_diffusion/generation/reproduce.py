"""A picture once more, from what it or its OUTPUT says, in this process; and what differs. No Ray.

Sources come through the job's own stage (LoadImages) and its `allow:`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from context_diffusion.core.errors import ErrorCode, JobError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Failure, Pixels, Result
from context_diffusion.core.schema import READ
from context_diffusion.core.uris import normal
from context_diffusion.generation.image_origin import Found, allowed, model_of, read_again
from context_diffusion.generation.local_model import Maker
from context_diffusion.generation.stages import LoadImages, requests_of
from context_diffusion.inputs.decode import decode_image, format_of
from context_diffusion.models.resolve import ResolvedModel
from context_diffusion.outputs.encode import encode_image
from context_diffusion.outputs.image_metadata import differing, job_of, metadata_of
from context_diffusion.storage.filesystem import Storage

ENDINGS: dict[str, Literal["png", "webp", "jpeg"]] = {"png": "png", "webp": "webp", "jpg": "jpeg", "jpeg": "jpeg"}


@dataclass(frozen=True)
class Again:
    """metadata: the texts of the new picture. differs: what is other than then, a line each."""

    image: Pixels
    metadata: dict[str, str]
    device: str
    identical: bool
    differs: list[str]


def make_again(found: Found, allow: list[str], model: str | None, base: str | None = None) -> Again:
    """allow, model, base: the user's word, in place of that of OUTPUT's job. Raises JobError where it cannot be made."""
    told, source = found.told, model_of(found, model)
    job = job_of(told, found.uri, source.parts or str(source.folder), found.planned)
    storage = Storage(job.storage_options)
    load = LoadImages(job, allow or allowed(found, base), source.image_size, source.contexts, storage)
    table = load(pa.Table.from_pylist([read_again(found, base, storage)], READ))
    [loaded] = table.to_pylist()
    if loaded["error_code"]:
        hint = "; --allow PREFIX permits it" if loaded["error_code"] == ErrorCode.FORBIDDEN_URI else ""
        if not found.output and not base:
            hint += "; --base FOLDER says where its manifest lay, which its sources are relative to"
        raise JobError(f"{found.uri} cannot be made: {loaded['error_code']}: {loaded['error_message']}{hint}")
    result = _generate(table, job, source, told.get("device"))
    now = told | {"model": f"{source.name}@{source.revision}", "device": result.device}
    metadata = metadata_of(now, loaded, job)
    as_file = decode_image(encode_image(result.image, format_of(found.data), metadata), Limits(), "the picture made now")
    pixels = _pixels(decode_image(found.data, Limits(), found.uri), as_file)
    differs = [*differing(told, metadata), *pixels]
    kept = metadata if not found.planned or found.planned.metadata else {}
    return Again(result.image, kept, result.device, not pixels, differs)


def _generate(table: pa.Table, job: GenerateJob, model: ResolvedModel, device: str | None) -> Result:
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
