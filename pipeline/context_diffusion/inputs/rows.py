"""Read raw rows into the READ table: ids, sources, prompts, settings. An invalid row gets an error code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from context_diffusion.core.errors import ErrorCode, ManifestError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Limits, problem_of
from context_diffusion.core.records import check_contexts, derive_id, derive_seed
from context_diffusion.core.schema import (
    CONTEXT,
    CONTEXT_MASKS,
    ID,
    MANIFEST_COLUMNS,
    NEGATIVE_PROMPT,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    READ,
    SETTINGS,
    SOURCE_LISTS,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.sweep import Matrix, check_combinations, combinations
from context_diffusion.inputs.image_sources import as_source, as_sources
from context_diffusion.inputs.text_rows import Row

NULLS = ("nan", "null")  # of a CSV's numbers and lists, in any case


@dataclass(frozen=True)
class RowRules:
    """What a job says about its rows.

    settings: defaults of the row settings; matrix: overrides of them; seed: what seeds are derived from;
    columns: our column name -> the manifest's; limits: what an untrusted row may ask for; refusal: why the
    model does not take settings, or None; context_slots: contexts that it takes, None: any number.
    """

    settings: Settings = field(default_factory=Settings)
    matrix: Matrix = field(default_factory=dict)
    seed: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    refusal: Callable[[Settings], str | None] | None = None
    context_slots: int | None = None

    @classmethod
    def of_job(cls, job: GenerateJob) -> RowRules:
        """Return the rules without what the job's model says."""
        return cls(job.settings, job.matrix, job.seed, job.columns, job.limits)

    @property
    def names(self) -> dict[str, str]:
        """Our column name -> the manifest's, for all columns."""
        return column_names(self.columns)


def column_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Return our column name -> the manifest's for all columns, given a job's `columns`."""
    return {name: columns.get(name, name) for name in MANIFEST_COLUMNS}


def given_id(row: Row, names: dict[str, str]) -> str | None:
    """Return the id in the row's own column, or None where the column is empty."""
    cell = _storable({"id": row.get(names[ID])})["id"]
    return None if cell is None or cell == "" else str(cell)


def row_id(row: Row, names: dict[str, str]) -> str:
    """Return the id in the row's own column, or one derived from the whole row."""
    from_column = given_id(row, names)
    return derive_id(_storable(row)) if from_column is None else from_column


def passed_name(name: str) -> str:
    """Return the output's name of an unknown manifest column, which is copied to the output."""
    return f"manifest_{name}" if name in OUTPUT.names else name


def read_table(
    rows: list[Row],
    shard: int,
    rules: RowRules,
    base: str,
    passed: pa.Schema,
    source: pa.Table | None = None,
    ids: list[str] | None = None,
) -> pa.Table:
    """Build the READ table of one shard.

    base: the manifest's folder, for relative URIs; passed: the schema of the unknown columns that are copied
    to the output; source: the rows as Arrow, if the file is Parquet: unknown columns are then copied from it
    unchanged; ids: the planned ids, if the rows may have changed since. Raises ManifestError where a row's id
    differs from its planned id.
    """
    names = rules.names
    storable = [_storable(row) for row in rows]
    for row, planned in zip(storable, ids or [], strict=False):
        if given_id(row, names) not in (None, planned):
            raise ManifestError(
                f"the plan has the id {planned!r} where the manifest has {given_id(row, names)!r}: did the "
                "manifest change?"
            )
    ids = ids or [row_id(row, names) for row in storable]
    read = [_read_row(row, id_, shard, rules, base, names) for row, id_ in zip(storable, ids, strict=True)]
    columns = {name: pa.array([row[name] for row in read], READ.field(name).type) for name in READ.names}
    for name, kind in zip(passed.names, passed.types, strict=True):
        if source is not None and name in source.column_names:
            columns[PASSED + passed_name(name)] = _cast(as_storage(source[name]), kind)
        else:
            columns[PASSED + passed_name(name)] = pa.array(
                [_as_type(row.get(name), kind) for row in rows], kind
            )
    return pa.table(columns)


def _storable(row: Row) -> Row:
    """Replace half surrogate pairs (valid in JSON, invalid in UTF-8) by `?`, and NaN by null."""

    def mend(value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, str):
            broken = any("\ud800" <= character <= "\udfff" for character in value)
            return value.encode("utf-8", "replace").decode() if broken else value
        return [mend(item) for item in value] if isinstance(value, list) else value

    return {name: mend(value) for name, value in row.items()}


def _read_row(row: Row, id_: str, shard: int, rules: RowRules, base: str, names: dict[str, str]) -> Row:
    read: Row = dict.fromkeys(READ.names) | {"shard": shard, ID: id_}
    try:
        for column in (PROMPT, NEGATIVE_PROMPT):
            read[column] = _prompt(row.get(names[column]), column, rules.limits)
        read[QUERY] = as_source(row.get(names[QUERY]), base)
        for column in SOURCE_LISTS:
            read[column] = as_sources(row.get(names[column]), base, column)
        _check_id(id_)
        settings = _settings(row, names, rules, id_)
        read["settings"] = settings.model_dump_json()
        if read[QUERY] is None:
            raise RowError(ErrorCode.NO_QUERY, f"the column {names[QUERY]!r} is empty")
        _check_contexts(read, settings, rules, names)
    except RowError as error:
        read["error_code"], read["error_message"] = str(error.code), error.message
    return read


def _check_contexts(read: Row, settings: Settings, rules: RowRules, names: dict[str, str]) -> None:
    """Check the number of the row's contexts, and of what it gives for each of them. Raises RowError."""
    if not read[CONTEXT]:
        message = f"the column {names[CONTEXT]!r} is empty; a row needs one or more"
        raise RowError(ErrorCode.NO_CONTEXT, message)
    count = len(read[CONTEXT])
    if count > rules.limits.max_contexts:
        read[CONTEXT] = None
        message = f"{names[CONTEXT]} has {count} images, at most {rules.limits.max_contexts} are allowed"
        raise RowError(ErrorCode.TOO_MANY_CONTEXTS, message)
    for weights in rules.matrix.get("context_weights", [settings.context_weights]):
        check_contexts(count, rules.context_slots, context_weights=weights, context_masks=read[CONTEXT_MASKS])


def _check_id(id_: str) -> None:
    if "\0" in id_ or any(part in (".", "..") for part in re.split(r"[/\\]", id_)):
        message = f"the id {id_[:200]!r} has a path part `.` or `..`, or a null byte"
        raise RowError(ErrorCode.INVALID_ID, message)


def _prompt(value: Any, name: str, limits: Limits) -> str | None:
    """Return the cell's text. An empty text stays "" and null stays None: some models distinguish them."""
    if value is None:
        return None
    text = str(value)
    if len(text) > limits.max_prompt_characters:
        allowed = f"at most {limits.max_prompt_characters} are allowed"
        message = f"{name} has {len(text)} characters, {allowed}: {text[:60]!r}..."
        raise RowError(ErrorCode.PROMPT_TOO_LONG, message)
    return text


def _settings(row: Row, names: dict[str, str], rules: RowRules, id_: str) -> Settings:
    """Return the row's settings over the job's, with a seed. This is where settings are validated, once."""
    given = {name: _plain(row.get(names[name]), name) for name in SETTINGS}
    cells = {name: value for name, value in given.items() if value is not None}
    try:
        settings = Settings.model_validate(rules.settings.model_dump() | cells)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else "settings"
        message = problem_of(first)
        code = ErrorCode.UNKNOWN_SCHEDULER if where == "scheduler" else ErrorCode.INVALID_SETTING
        raise RowError(code, f"{where}: {message}, got {str(first['input'])[:80]!r}") from None
    try:
        check_combinations(settings, rules.matrix)
    except ValueError as error:
        raise RowError(ErrorCode.INVALID_SETTING, str(error)) from None
    for combination in combinations(rules.matrix):
        if rules.refusal and (reason := rules.refusal(settings.model_copy(update=combination))):
            raise RowError(ErrorCode.INVALID_SETTING, reason)
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": derive_seed(rules.seed, id_)})
    return settings


def _plain(value: Any, name: str) -> Any:
    """Convert a cell to what Settings accepts: CSV text is parsed, NaN is null, whole floats become
    integers."""
    if isinstance(value, str) and name not in ("scheduler", "context_blocks", "lora"):
        if value.strip().lower() in NULLS:
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    annotation = Settings.model_fields[name].annotation
    integer = annotation in (int, int | None) or name in ("seed", "width", "height")
    if integer and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert a column of an extension type (tensor, bool8) to its storage type, which every reader knows."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], storage_type(column.type))


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Cast a column to its type over the whole manifest; lists and structs become JSON if that is text."""
    try:
        return column.cast(kind)
    except pa.ArrowException:
        return pa.chunked_array([pa.array([_as_type(value, kind) for value in column.to_pylist()], kind)])


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Return the storage type of an extension type, and other types unchanged."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _as_type(value: Any, kind: pa.DataType) -> Any:
    """Convert a value of a copied column to its type; to JSON text where types differ over the manifest."""
    if value is None or not pa.types.is_string(kind):
        return value
    return value if isinstance(value, str) else json.dumps(value, default=str)
