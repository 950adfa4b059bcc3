"""The metadata that reproduces an image: written into its file, read from there or from its row of OUTPUT.

Generates no pixels. The metadata of an image file is untrusted input: it is validated like a job, and names
no folder or model that is opened without the user's consent.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from context_diffusion.core.errors import JobError, RowError
from context_diffusion.core.generate_job import ControlName, control_kinds
from context_diffusion.core.job_base import Fit, StrictModel
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.schema import (
    CONTEXT,
    CONTEXT_MASKS,
    ID,
    NEGATIVE_PROMPT,
    PROMPT,
    QUERY,
    SETTING_TYPES,
    SOURCE_LISTS,
    SOURCES,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.uris import resolve
from context_diffusion.outputs.encode import read_metadata

KEY = "context_diffusion"  # of the text in an image file that holds the metadata as JSON
SOFTWARE = {"Software": "context-diffusion"}
VERSIONED = ("context-diffusion", "torch", "diffusers", "transformers")  # packages that pixels may depend on
RUNTIME = ("device", "chunk", "compiled")  # what bits depend on, of the engine that generated the image
ROW = (ID, "index", *SETTING_TYPES, "width", "height", *SOURCES, PROMPT, NEGATIVE_PROMPT,
       "full_prompt", "control", "fit", "model", *RUNTIME)  # fmt: skip
# columns of loaded pixels
INPUTS = {
    QUERY: "query_image",
    "control": "control_images",
    CONTEXT: "context_images",
    CONTEXT_MASKS: "mask_images",
}
Metadata = dict[str, Any]


class _Untrusted(BaseModel):
    """The types of the entries that are used as they are.

    Settings, fit and control are validated where they are used.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    id: str
    index: int
    query: str
    context: list[str]
    control_image: list[str] = []
    context_masks: list[str] = []
    prompt: str | None = None
    negative_prompt: str | None = None
    control: str
    model: str
    device: str | None = None
    chunk: int | None = None
    compiled: bool = False
    versions: dict[str, str] = {}
    inputs: dict[str, list[str]] = {}


class _Sides(StrictModel):
    """The size of an image, which may be smaller or larger than a row can ask for: a FLUX.2's is the
    query's."""

    width: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None
    height: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None


class _Loading(StrictModel):
    fit: Fit
    control: list[ControlName]


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that pixels may depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def metadata_texts(written: dict[str, Any], loaded: dict[str, Any], parts: Parts | None) -> dict[str, str]:
    """Return the texts of an image file.

    written: the image's row of the part; loaded: its row of the flow; parts: of a pretrained model. The texts
    hold no time and no place, so equal rows have equal bytes.
    """
    metadata = {key: written[key] for key in ROW if written.get(key) is not None}
    metadata |= {"versions": versions(), "inputs": input_digests(loaded)}
    if parts is not None:
        metadata["parts"] = parts.model_dump(mode="json", exclude_defaults=True)
    return {KEY: json.dumps(metadata, sort_keys=True), **SOFTWARE}


def input_digests(loaded: dict[str, Any]) -> dict[str, list[str]]:
    """Hash the pixels that the model was given; a control map that the engine computes is none of them."""
    columns = {name: loaded[column] for name, column in INPUTS.items()}
    images = {name: value if isinstance(value, list) else [value] for name, value in columns.items()}
    return {
        name: [hashlib.blake2b(image["data"], digest_size=16).hexdigest() for image in column if image]
        for name, column in images.items()
    }


def metadata_in(data: bytes, name: str) -> Metadata:
    """Read the metadata of an image file; empty where it has none, or where the text of a JPEG was cut.

    Raises JobError if the file is no image, or holds metadata that is not of this format.
    """
    try:
        metadata = json.loads(read_metadata(data).get(KEY, "null"))
        if metadata:
            _Untrusted.model_validate(metadata)
        return metadata or {}
    except RowError as error:
        raise JobError(f"{name}: {error.message}") from error
    except ValidationError as error:
        raise JobError(f"{name}: its metadata has an invalid entry: {_first(error)}") from None
    except ValueError:
        return {}


def metadata_of_row(row: dict[str, Any], record: Any) -> Metadata:
    """Return the same metadata from a row of OUTPUT and its plan.json."""
    return {key: row[key] for key in ROW if row.get(key) is not None} | {"versions": record["versions"]}


def settings_of(metadata: Metadata, name: str) -> Settings:
    """Return the settings of the one image. Raises JobError."""
    values = {key: metadata[key] for key in SETTING_TYPES if key in metadata}
    if "seed" not in values:
        raise JobError(f"{name}: its metadata has no seed")
    try:
        sides = _Sides.model_validate({key: metadata[key] for key in _Sides.model_fields if key in metadata})
        settings = Settings.model_validate(values | {"num_images": 1})
    except ValidationError as error:
        raise JobError(f"{name}: its metadata has an invalid setting: {_first(error)}") from None
    return settings.model_copy(update=sides.model_dump())


def loading_of(metadata: Metadata, name: str) -> tuple[Fit, list[str]]:
    """Return how the query was fitted and the kind of each control map. Raises JobError."""
    values = {"fit": metadata.get("fit", "crop"), "control": str(metadata.get("control", "gray")).split("+")}
    try:
        loading = _Loading.model_validate(values)
    except ValidationError as error:
        raise JobError(f"{name}: its metadata has an invalid entry: {_first(error)}") from None
    return loading.fit, control_kinds(loading.control)


def sources_of(metadata: Metadata, base: str) -> dict[str, Any]:
    """Return query, contexts and control maps as source columns. base: the folder of relative URIs."""
    sources: dict[str, Any] = {QUERY: _source(metadata["query"], base)}
    for column in SOURCE_LISTS:
        sources[column] = [_source(uri, base) for uri in metadata.get(column, [])]
    return sources


def _source(uri: str, base: str) -> dict[str, Any]:
    return {"bytes": None, "path": resolve(uri, base)}


def model_parts_of(metadata: Metadata, name: str) -> Parts | None:
    """Return the parts of a model that is more than a name. Raises JobError."""
    try:
        return Parts.model_validate(metadata["parts"]) if "parts" in metadata else None
    except ValidationError as error:
        raise JobError(f"{name}: its metadata has an invalid model: {_first(error)}") from None


def differences(before: Metadata, texts: dict[str, str]) -> list[str]:
    """List the differences between an image's metadata and the texts of the image generated now.

    Unknown entries are skipped.
    """
    now = json.loads(texts[KEY])
    compared = [(name, before.get(name), now.get(name)) for name in (*RUNTIME, "model")]
    compared += [
        (name, version, now["versions"].get(name)) for name, version in before.get("versions", {}).items()
    ]
    lines = [
        f"{name}: {then} then, {present} now" for name, then, present in compared if then and then != present
    ]
    return lines + list(_changed_inputs(before, now))


def _changed_inputs(before: Metadata, now: Metadata) -> Iterator[str]:
    for name, digests in before.get("inputs", {}).items():
        pairs = enumerate(zip(digests, now["inputs"].get(name, []), strict=False))
        changed = [number for number, (then, present) in pairs if then != present]
        uris = before[name] if isinstance(before.get(name), list) else [before.get(name)]
        where = [f"map {number + 1}" if name == "control" else str(uris[number]) for number in changed]
        if changed:
            yield f"{name}: its pixels changed: {', '.join(where)}"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg'].removeprefix('Value error, ')}, got {str(first['input'])[:80]!r}"
