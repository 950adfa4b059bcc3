"""What makes a picture again: told in its metadata, read back from there or from its row of OUTPUT. No pixels are made.

A picture's metadata is not trusted: it is checked as a job is, and opens no other folders and models than the user says.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from context_diffusion.core.errors import JobError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.schema import CONTEXT, CONTROL_IMAGE, ID, NEGATIVE_PROMPT, PROMPT, QUERY, SETTING_TYPES
from context_diffusion.core.settings import Settings
from context_diffusion.core.uris import resolve
from context_diffusion.outputs.encode import read_metadata

KEY, MARK = "context_diffusion", {"Software": "context-diffusion"}  # texts of a picture's metadata
VERSIONED = ("context-diffusion", "torch", "diffusers", "transformers")  # what pixels may depend on
ROW = (ID, "index", *SETTING_TYPES, "width", "height", QUERY, CONTEXT, CONTROL_IMAGE, PROMPT, NEGATIVE_PROMPT, "control",
       "fit", "model", "device")  # fmt: skip
INPUTS = {QUERY: "query_image", "control": "control_images", CONTEXT: "context_images"}  # a loaded row's pixels
Told = dict[str, Any]


class _Checked(BaseModel):
    """What is used of it as it is; the settings are checked with it (Settings)."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str
    index: int
    query: str
    context: list[str]
    control_image: list[str] = []
    prompt: str | None = None
    negative_prompt: str | None = None
    control: str
    model: str
    device: str | None = None
    versions: dict[str, str] = {}
    inputs: dict[str, list[str]] = {}


@cache
def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def metadata_of(written: dict[str, Any], loaded: dict[str, Any], job: GenerateJob) -> dict[str, str]:
    """A picture's texts. written: its row of the part; loaded: its row of the flow. No time and no place stands in them, so
    equal rows have equal bytes."""
    if not job.metadata:
        return {}
    told = {key: written[key] for key in ROW if written.get(key) is not None}
    told |= {"versions": versions(), "inputs": digests(loaded)}
    if isinstance(job.model, Parts):
        told["parts"] = job.model.model_dump(mode="json", exclude_defaults=True)
    return {KEY: json.dumps(told, sort_keys=True), **MARK}


def digests(loaded: dict[str, Any]) -> dict[str, list[str]]:
    """Of the pixels that the model was given."""
    pictures = {name: loaded[column] for name, column in INPUTS.items()}
    listed = {name: found if isinstance(found, list) else [found] for name, found in pictures.items()}
    return {name: [hashlib.blake2b(one["data"], digest_size=16).hexdigest() for one in found] for name, found in listed.items()}


def told_in(data: bytes, name: str) -> Told:
    """What a picture file says of itself; nothing where it says nothing, or where a JPEG's text had to be cut. Raises
    JobError for what is no picture, or says what no picture of ours does."""
    try:
        told = json.loads(read_metadata(data).get(KEY, "null"))
        if told:
            _Checked.model_validate(told)
        return told or {}
    except RowError as error:
        raise JobError(f"{name}: {error.message}") from error
    except ValidationError as error:
        raise JobError(f"{name}: its metadata is not a picture's of ours: {_first(error)}") from None
    except ValueError:
        return {}


def told_by(row: dict[str, Any], record: Any) -> Told:
    """The same of a row of OUTPUT and its plan.json."""
    told = {key: row[key] for key in ROW if row.get(key) is not None}
    return told | {"versions": record["versions"]}


def settings_of(told: Told, name: str) -> Settings:
    """Those of the one image. Raises JobError."""
    own = {key: told[key] for key in (*SETTING_TYPES, "width", "height") if key in told}
    if "seed" not in own:
        raise JobError(f"{name}: its metadata has no seed")
    try:
        return Settings.model_validate(own | {"num_images": 1})
    except ValidationError as error:
        raise JobError(f"{name}: its metadata is no row's: {_first(error)}") from None


def sources_of(told: Told, base: str) -> dict[str, Any]:
    """Query, contexts and control maps as columns of sources. base: the folder of relative ones."""
    contexts, maps = ([_source(uri, base) for uri in told.get(column, [])] for column in (CONTEXT, CONTROL_IMAGE))
    return {QUERY: _source(told["query"], base), CONTEXT: contexts, CONTROL_IMAGE: maps}


def _source(uri: str, base: str) -> dict[str, Any]:
    return {"bytes": None, "path": resolve(uri, base)}


def parts_of(told: Told, name: str) -> Parts | None:
    """Of a model that is more than a name. Raises JobError."""
    try:
        return Parts.model_validate(told["parts"]) if "parts" in told else None
    except ValidationError as error:
        raise JobError(f"{name}: its metadata is no model's: {_first(error)}") from None


def differing(told: Told, metadata: dict[str, str]) -> list[str]:
    """What was other when the picture was made than is told in its new metadata, a line each; what is not told cannot be."""
    now = json.loads(metadata[KEY])
    found = [("device", told.get("device"), now["device"])]
    found += [("model", told.get("model"), now["model"])]
    found += [(name, version, now["versions"].get(name)) for name, version in told.get("versions", {}).items()]
    lines = [f"{name}: {before} then, {after} now" for name, before, after in found if before and before != after]
    for name, digests_then in told.get("inputs", {}).items():
        changed = [number for number, (a, b) in enumerate(zip(digests_then, now["inputs"].get(name, []), strict=False)) if a != b]
        uris = told[name] if isinstance(told.get(name), list) else [told.get(name)]
        where = ", ".join(str(uris[number]) if name != "control" else f"map {number + 1}" for number in changed)
        lines += [f"{name}: other pixels than then: {where}"] if changed else []
    return lines


def job_of(told: Told, name: str, model: str | Parts, planned: GenerateJob | None) -> GenerateJob:
    """A job that loads and makes what is told. planned: OUTPUT's own job, for limits and storage. Raises JobError."""
    control = str(told.get("control", "gray")).split("+")
    values: dict[str, Any] = {"kind": "generate", "manifest": name, "output": name, "model": model, "control": control}
    values |= {"fit": told.get("fit", "crop")}
    if planned:
        values |= {"limits": planned.limits, "storage_options": planned.storage_options}
    try:
        return GenerateJob.model_validate(values)
    except ValidationError as error:
        raise JobError(f"{name}: its metadata is no job's: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}, got {str(first['input'])[:80]!r}"
