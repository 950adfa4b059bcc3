"""Reads manifest files as raw rows, which are plain dicts: Parquet by row group, JSONL and CSV by byte
offsets.

Knows file formats, but no meaning of columns (inputs/rows.py).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.core.errors import ManifestError
from context_diffusion.core.records import Shard
from context_diffusion.core.uris import normal, parent
from context_diffusion.inputs.text_rows import Row, csv_records, csv_rows, json_rows
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import NotParquetError, read_parquet_file

T = TypeVar("T")
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
GLOB = set("*?[")
PARTITION = re.compile(r"[A-Za-z_]\w*=.")  # folders that name a column
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ManifestFile:
    """Describes a file of a manifest. groups: rows of each row group (Parquet); columns: Parquet and CSV, and
    of a planned JSONL file the known ones that its rows have."""

    uri: str
    format: str
    columns: list[str]
    groups: list[int]


def expand(manifests: list[str], storage: Storage) -> list[str]:
    """Return the files of paths, URLs, globs and folders, sorted within each entry. Raises ManifestError."""
    files: list[str] = []
    for entry in manifests:
        if storage.is_folder(entry):
            folder_files = visible(storage.files(entry), normal(entry))
            entry_files = [uri for suffix in FORMATS for uri in folder_files if uri.endswith(suffix)]
        elif storage.exists(entry):  # even if its name has characters of a glob
            entry_files = [entry]
        else:
            entry_files = storage.glob(entry) if GLOB & set(entry) else []
        if not entry_files:
            expected = "expected a Parquet, JSONL or CSV file, a folder or a glob"
            raise ManifestError(f"{entry}: there is no such manifest: {expected}")
        files += entry_files
    return files


def visible(files: list[str], folder: str) -> list[str]:
    """Return the files below a folder that are data.

    Excludes the files of an OUTPUT, and names that begin with a dot or an underscore, such as checkpoints and
    logs, but not partitions (`_x=1`).
    """
    outputs = [f"{parent(uri)}/" for uri in files if uri.endswith("/plan.json") and parent(uri) != folder]

    def hidden(uri: str) -> bool:
        names = uri.removeprefix(folder).strip("/").split("/")
        return any(
            name.startswith((".", "__MACOSX")) or (name.startswith("_") and "=" not in name) for name in names
        )

    return [uri for uri in files if not hidden(uri) and not uri.startswith(tuple(outputs))]


def open_file(uri: str, storage: Storage) -> ManifestFile:
    """Read the columns of a Parquet or CSV file and the row groups of Parquet. Raises ManifestError."""
    name = uri.rsplit("/", 1)[-1].lower()
    manifest_format = next((FORMATS[suffix] for suffix in FORMATS if name.endswith(suffix)), None)
    if manifest_format is None:
        raise ManifestError(f"{uri}: expected a name that ends in one of {', '.join(FORMATS)}")
    if manifest_format == "parquet":
        columns, groups = _parquet(uri, storage, _names_and_groups, "not a readable Parquet file")
        return ManifestFile(uri, manifest_format, columns, groups)
    columns = _csv_header(uri, storage) if manifest_format == "csv" else []
    return ManifestFile(uri, manifest_format, columns, [])


def _csv_header(uri: str, storage: Storage) -> list[str]:
    """Read the columns of a CSV file. Raises ManifestError for other separators and duplicate columns."""
    with storage.open(uri) as file:
        *_, columns = next(csv_records(uri, file, 0))
    for sign, name in ((";", "`;`, as Excel does in many languages"), ("\t", "tabs")):
        if len(columns) == 1 and sign in columns[0]:
            raise ManifestError(f"{uri}: the header is separated by {name}; a CSV manifest needs commas")
    duplicates = sorted({name for name in columns if columns.count(name) > 1})
    if duplicates:
        raise ManifestError(f"{uri}: the header names {', '.join(duplicates)} more than once")
    return columns


def partitions(uri: str) -> dict[str, str | None]:
    """Return the columns that a file's folders name in Hive's notation, such as `num_inference_steps=3/`.

    A column of the file itself takes precedence.
    """
    pairs = [folder.split("=", 1) for folder in uri.split("/")[:-1] if PARTITION.match(folder)]
    return {unquote(name): None if value == HIVE_NULL else unquote(value) for name, value in pairs}


def parquet_schema(uri: str, storage: Storage) -> pa.Schema:
    """Read the schema of a Parquet file. Raises ManifestError."""
    return _parquet(uri, storage, lambda file: file.schema_arrow, "not a readable Parquet file")


def raw_rows(file: ManifestFile, storage: Storage) -> Iterator[Row]:
    """Read all rows of a manifest file one by one."""
    if file.format == "parquet":
        return scan_parquet(file, storage, None)
    return (row for *_, row in scan_text(file, storage))


def scan_text(file: ManifestFile, storage: Storage) -> Iterator[tuple[int, int, Row]]:
    """Read all rows of a JSONL or CSV file one by one as (begin, end, row), with the byte offsets of each."""
    folders = partitions(file.uri)
    with storage.open(file.uri) as handle:
        if file.format == "jsonl":
            rows = json_rows(file.uri, handle, 0)
        else:
            records = csv_records(file.uri, handle, 0)
            next(records)  # the header
            rows = csv_rows(file.uri, file.columns, records)
        for begin, end, row in rows:
            yield begin, end, folders | row


def scan_parquet(file: ManifestFile, storage: Storage, columns: list[str] | None) -> Iterator[Row]:
    """Read all rows of a Parquet file one by one. columns: those that are read; None: all."""
    for group in range(len(file.groups)):
        for batch in _row_group(file, group, storage, columns).to_batches(4096):
            yield from rows_of(batch)


def scan_texts(file: ManifestFile, storage: Storage, columns: list[str]) -> Iterator[Row]:
    """Read all rows with these columns only, and from Parquet only their texts, not the bytes of images."""

    def texts(opened: pq.ParquetFile, group: int) -> pa.Table:
        leaves = map(opened.schema.column, range(len(opened.schema)))
        chosen = [
            leaf.path
            for leaf in leaves
            if leaf.path.split(".")[0] in columns
            and leaf.path.split(".")[-1] in (leaf.path.split(".")[0], "element", "item", "path")
            and str(leaf.logical_type) == "String"
        ]
        return opened.read_row_group(group, chosen)

    if file.format != "parquet":
        yield from ({name: row.get(name) for name in columns} for *_, row in scan_text(file, storage))
    for group in range(len(file.groups)):
        wrong = f"row group {group} cannot be read as Parquet"
        for batch in _parquet(file.uri, storage, partial(texts, group=group), wrong).to_batches(4096):
            yield from batch.to_pylist()


def read_text(file: ManifestFile, shard: Shard, storage: Storage) -> list[Row]:
    """Read the rows of a shard of a JSONL or CSV file. Raises ManifestError if the file changed."""
    handle = io.BytesIO(storage.read_range(file.uri, shard.offset, shard.size))
    folders = partitions(file.uri)
    if file.format == "jsonl":
        rows = [folders | row for *_, row in json_rows(file.uri, handle, shard.first_row)]
    else:
        rows = [
            folders | row
            for *_, row in csv_rows(
                file.uri, file.columns, csv_records(file.uri, handle, shard.first_row + 1)
            )
        ]
    _check_count(file, shard, len(rows))
    return rows


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """Return the rows of a table. Values without a Python type, such as the year 10000, become text."""
    columns = [_plain_values(column) for column in table.columns]
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _plain_values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except (OverflowError, ValueError, ImportError, pa.ArrowException):
        try:
            return column.cast(pa.string()).to_pylist()
        except pa.ArrowException:
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            return [array.slice(row, 1).to_string() for row in range(len(array))]  # nested values


def read_parquet(file: ManifestFile, shard: Shard, storage: Storage) -> pa.Table:
    """Read the rows of a shard of a Parquet file. Raises ManifestError if the file changed.

    Its row group is cached in this process for the next shards: a group cannot be read from the middle,
    and Ray Data would join the blocks of a task that reads all of it.
    """
    key = (file.uri, shard.group, str(storage.fingerprint(file.uri)))  # the file may have changed
    if key not in _last_group:
        _last_group.clear()
        _last_group[key] = _row_group(file, shard.group, storage)
    rows = _last_group[key].slice(shard.first_row, shard.rows)
    _check_count(file, shard, len(rows))
    return rows


_last_group: dict[tuple[str, int, str], pa.Table] = {}


def _check_count(file: ManifestFile, shard: Shard, count: int) -> None:
    if count != shard.rows:
        raise ManifestError(f"{file.uri}: {count} rows where the plan has {shard.rows}: did the file change?")


def _row_group(
    file: ManifestFile, group: int, storage: Storage, columns: list[str] | None = None
) -> pa.Table:
    problem = f"row group {group} cannot be read as Parquet"
    table = _parquet(file.uri, storage, lambda parquet: parquet.read_row_group(group, columns), problem)
    for name, value in partitions(file.uri).items():
        if columns is None and name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


def _parquet(uri: str, storage: Storage, read: Callable[[pq.ParquetFile], T], problem: str) -> T:
    """Return the result of `read`. Raises ManifestError with `problem`."""
    try:
        return read_parquet_file(storage, uri, read)
    except NotParquetError as error:
        raise ManifestError(f"{uri}: {problem}: {error}") from error


def _names_and_groups(file: pq.ParquetFile) -> tuple[list[str], list[int]]:
    """Return a file's columns, and the rows of each row group."""
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return file.schema_arrow.names, groups
