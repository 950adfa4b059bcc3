"""Generate an image again in this process, from its metadata or its OUTPUT, and compare the two. Knows no
Ray.

Sources are loaded by the job's own stage (LoadImages), within its `allow`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from context_diffusion.core.errors import ErrorCode, JobError
from context_diffusion.core.generate_job import Cluster
from context_diffusion.core.job_base import Limits
from context_diffusion.core.records import Failure, Pixels, Result
from context_diffusion.core.schema import READ
from context_diffusion.core.uris import normal
from context_diffusion.generation.image_origin import ImageOrigin, allowed, model_of, read_row
from context_diffusion.generation.local_model import LocalModel
from context_diffusion.generation.stages.generate import requests_of
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.inputs.decode import decode_image, format_of
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.outputs.encode import encode_image
from context_diffusion.outputs.image_metadata import RUNTIME, differences, loading_of, metadata_texts
from context_diffusion.storage.filesystem import Storage

ENDINGS: dict[str, Literal["png", "webp", "jpeg"]] = {
    "png": "png",
    "webp": "webp",
    "jpg": "jpeg",
    "jpeg": "jpeg",
}


@dataclass(frozen=True)
class Reproduction:
    """texts: the metadata of the new image file; differs: what is different from the first time, a line
    each."""

    image: Pixels
    texts: dict[str, str]
    device: str
    identical: bool
    differs: list[str]


def reproduce(
    origin: ImageOrigin, allow: list[str], model: str | None, base: str | None = None
) -> Reproduction:
    """Generate the image again. Raises JobError where that is not possible.

    allow, model, base: replace those of OUTPUT's job.
    """
    source = model_of(origin, model)
    result, loaded = _generate(origin, source, allow, base)
    now = origin.metadata | {name: getattr(result, name) for name in RUNTIME}
    now["model"] = f"{source.name}@{source.revision}"
    texts = metadata_texts(now, loaded, source.parts)
    data = encode_image(result.image, format_of(origin.data), texts)
    then = decode_image(origin.data, Limits(), origin.uri)
    changed_pixels = _pixel_differences(then, decode_image(data, Limits(), "the new image"))
    differs = [*differences(origin.metadata, texts), *changed_pixels]
    written = texts if not origin.planned or origin.planned.metadata else {}
    return Reproduction(result.image, written, result.device, not changed_pixels, differs)


def _generate(
    origin: ImageOrigin, model: ResolvedModel, allow: list[str], base: str | None
) -> tuple[Result, dict[str, Any]]:
    """Return the image and its row of loaded pixels."""
    fit, kinds = loading_of(origin.metadata, origin.uri)
    job = origin.planned
    limits, storage = (job.limits, Storage(job.storage_options)) if job else (Limits(), Storage())
    prefixes = allow or allowed(origin, base)
    load = LoadImages.for_model(model, fit, kinds, limits, prefixes, storage)
    table = load(pa.Table.from_pylist([read_row(origin, base, storage)], READ))
    [loaded] = table.to_pylist()
    if loaded["error_code"]:
        hint = "; --allow PREFIX permits it" if loaded["error_code"] == ErrorCode.FORBIDDEN_URI else ""
        if not origin.output and not base:
            hint += (
                "; relative sources are looked up beside the image, --base FOLDER names the folder of "
                "their manifest"
            )
        message = f"{loaded['error_code']}: {loaded['error_message']}{hint}"
        raise JobError(f"{origin.uri} cannot be generated again: {message}")
    [requests] = requests_of(table, kinds, {})
    local = _local_model(origin, model)
    recorded = origin.metadata.get("chunk")
    chunk = recorded if recorded in local.chunks else None  # another device's, or of an earlier version
    [outcome] = local.generate(requests, chunk)
    if isinstance(outcome, Failure):
        raise JobError(f"{origin.uri} cannot be generated again: {outcome.code}: {outcome.message}")
    return outcome, loaded


def _local_model(origin: ImageOrigin, model: ResolvedModel) -> LocalModel:
    """Load the model as it was when it generated the image: on a CPU, or on a GPU where there is one."""
    device = "cpu" if origin.metadata.get("device") == "cpu" else None
    cluster = origin.planned.cluster if origin.planned else Cluster()
    return LocalModel(model, cluster.cpu_threads, device, bool(origin.metadata.get("compiled")))


def _pixel_differences(then: Pixels, now: Pixels) -> list[str]:
    """Describe how the pixels differ; empty where they are equal."""
    if then.shape != now.shape:
        return [f"size: {then.shape[1]} x {then.shape[0]} then, {now.shape[1]} x {now.shape[0]} now"]
    difference = abs(then.astype(int) - now)
    largest = difference.max()
    if not largest:
        return []
    share = (difference.max(axis=2) > 0).mean()
    return [f"pixels: {share:.2%} differ, by at most {largest} of 255, {difference.mean():.3f} on average"]


def writer(output: str | None) -> Callable[[Reproduction], None]:
    """Return what writes the new image, in the format of the file's ending. Raises JobError at once where it
    cannot."""
    if output is None:
        return lambda reproduction: None
    uri, storage = normal(output), Storage()
    image_format = ENDINGS.get(uri.rsplit(".", 1)[-1].lower())
    if image_format is None:
        raise JobError(f"--output {output}: expected a name that ends in .{', .'.join(ENDINGS)}")
    if storage.exists(uri):
        raise JobError(f"--output {output} exists already")

    def write(reproduction: Reproduction) -> None:
        if not storage.create(uri, encode_image(reproduction.image, image_format, reproduction.texts)):
            raise JobError(f"--output {output} exists already")

    return write
