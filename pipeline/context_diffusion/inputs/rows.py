"""Raw rows -> the READ table: ids, sources, prompts, settings. What is wrong with a row is written into the row."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from context_diffusion.core.errors import ErrorCode, ManifestError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import derive_id, derive_seed
from context_diffusion.core.schema import (
    CONTEXT,
    CONTROL_IMAGE,
    ID,
    MANIFEST_COLUMNS,
    NEGATIVE_PROMPT,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    READ,
    SETTINGS,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.sweep import combined
from context_diffusion.inputs.image_sources import as_source, as_sources
from context_diffusion.inputs.manifest_files import Row


def column_names(job: GenerateJob) -> dict[str, str]:
    """Our column name -> the manifest's."""
    return {name: job.columns.get(name, name) for name in MANIFEST_COLUMNS}


def given_id(row: Row, names: dict[str, str]) -> str | None:
    """The id that the row itself gives; None where it gives none."""
    given = _storable({"id": row.get(names[ID])})["id"]
    return None if given is None or given == "" else str(given)


def row_id(row: Row, names: dict[str, str]) -> str:
    """The id that the row gives, or one derived from all of it."""
    given = given_id(row, names)
    return derive_id(_storable(row)) if given is None else given


def passed_name(name: str) -> str:
    """The output's name of a manifest column that we don't know."""
    return f"manifest_{name}" if name in OUTPUT.names else name


def read_table(
    rows: list[Row],
    shard: int,
    job: GenerateJob,
    base: str,
    passed: pa.Schema,
    source: pa.Table | None = None,
    ids: list[str] | None = None,
) -> pa.Table:
    """Make the READ table of one shard.

    base: the manifest's folder, for relative URIs; passed: the manifest's columns that we don't know; source: the rows as
    Arrow, where the file has them so: those columns are copied from it as they are; ids: those that the rows were planned
    with, where the rows may say something else now.
    """
    names = column_names(job)
    storable = [_storable(row) for row in rows]
    for row, planned in zip(storable, ids or [], strict=False):
        if given_id(row, names) not in (None, planned):
            raise ManifestError(
                f"the row {planned!r} of the plan has the id {given_id(row, names)!r} now: did the manifest change?"
            )
    named = ids or [row_id(row, names) for row in storable]
    read = [_read_row(row, name, shard, job, base, names) for row, name in zip(storable, named, strict=True)]
    columns = {name: pa.array([row[name] for row in read], READ.field(name).type) for name in READ.names}
    for field in passed:
        if source is not None and field.name in source.column_names:
            columns[PASSED + passed_name(field.name)] = _cast(as_storage(source[field.name]), field.type)
            continue
        values = [_as_type(row.get(field.name), field.type) for row in rows]
        columns[PASSED + passed_name(field.name)] = pa.array(values, field.type)
    return pa.table(columns)


def _storable(row: Row) -> Row:
    """Half a surrogate pair is JSON but no UTF-8: such text would end the shard, so it is marked where it stands. NaN is what
    is missing: null."""

    def mend(value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode() if any("\ud800" <= c <= "\udfff" for c in value) else value
        return [mend(item) for item in value] if isinstance(value, list) else value

    return {name: mend(value) for name, value in row.items()}


def _read_row(row: Row, name: str, shard: int, job: GenerateJob, base: str, names: dict[str, str]) -> Row:
    read: Row = dict.fromkeys(READ.names)
    read["shard"], read[ID] = shard, name
    try:
        read[PROMPT], read[NEGATIVE_PROMPT] = (_prompt(row.get(names[n]), n, job) for n in (PROMPT, NEGATIVE_PROMPT))
        read[QUERY] = as_source(row.get(names[QUERY]), base)
        read[CONTEXT], read[CONTROL_IMAGE] = (as_sources(row.get(names[n]), base) for n in (CONTEXT, CONTROL_IMAGE))
        _check_id(read[ID])
        read["settings"] = _settings(row, names, job, read[ID]).model_dump_json()
        if read[QUERY] is None:
            raise RowError(ErrorCode.NO_QUERY, f"the column {names[QUERY]!r} is empty")
        if not read[CONTEXT]:
            raise RowError(ErrorCode.NO_CONTEXT, f"the column {names[CONTEXT]!r} is empty; a row needs one or more")
        if (count := len(read[CONTEXT])) > job.limits.max_contexts:
            read[CONTEXT] = None
            message = f"{names[CONTEXT]} has {count} pictures, allowed are {job.limits.max_contexts}"
            raise RowError(ErrorCode.TOO_MANY_CONTEXTS, message)
    except RowError as error:
        read["error_code"], read["error_message"] = str(error.code), error.message
    return read


def _check_id(row: str) -> None:
    if "\0" in row or any(part in (".", "..") for part in re.split(r"[/\\]", row)):
        raise RowError(ErrorCode.INVALID_ID, f"the id {row[:200]!r} is a way out of a folder; ids hold no `.` or `..` parts")


def _prompt(value: Any, name: str, job: GenerateJob) -> str | None:
    """The cell's text; "" is a prompt that says nothing, null is none: some models tell them apart."""
    if value is None:
        return None
    text = str(value)
    if len(text) > job.limits.max_prompt_characters:
        raise RowError(
            ErrorCode.PROMPT_TOO_LONG,
            f"{name} has {len(text)} characters, allowed are {job.limits.max_prompt_characters}: {text[:60]!r}...",
        )
    return text


def _settings(row: Row, names: dict[str, str], job: GenerateJob, row_name: str) -> Settings:
    own = {name: _plain(row[names[name]], name) for name in SETTINGS if row.get(names[name]) is not None}
    try:
        settings = Settings.model_validate(job.settings.model_dump() | own)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else "settings"
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        code = ErrorCode.UNKNOWN_SCHEDULER if where == "scheduler" else ErrorCode.INVALID_SETTING
        raise RowError(code, f"{where}: {message}, got {str(first['input'])[:80]!r}") from None
    try:
        combined(settings, job.matrix)
    except ValueError as error:
        raise RowError(ErrorCode.INVALID_SETTING, str(error)) from None
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": derive_seed(job.seed, row_name)})
    return settings


def _plain(value: Any, name: str) -> Any:
    """A cell as the settings' model takes it: CSV text parsed, whole floats as integers, numpy lists as lists."""
    if isinstance(value, str) and name != "scheduler":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    integer = Settings.model_fields[name].annotation in (int, int | None) or name in ("seed", "width", "height")
    if integer and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of an extension type (a tensor, bool8) as what it is stored as: readers need not know the extension."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], storage_type(column.type))


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as its type over the whole manifest; lists and structs beside a text file's column become JSON."""
    try:
        return column.cast(kind)
    except pa.ArrowException:
        return pa.chunked_array([pa.array([_as_type(value, kind) for value in column.to_pylist()], kind)])


def storage_type(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _as_type(value: Any, kind: pa.DataType) -> Any:
    """A value of a passed column as its type holds it; text where types differ over the manifest."""
    if value is None or not pa.types.is_string(kind):
        return value
    return value if isinstance(value, str) else json.dumps(value, default=str)
