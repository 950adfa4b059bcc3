"""Manifest files -> raw rows: Parquet by row group, JSONL and CSV by byte offsets. Rows are plain dicts here.

Knows formats, not what a row means (inputs/rows.py).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.core.errors import ManifestError
from context_diffusion.core.records import Shard
from context_diffusion.core.uris import normal, parent
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import NotParquetError, read_parquet_file

T = TypeVar("T")
Row = dict[str, Any]
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
GLOB = set("*?[")
PARTITION, HIVE_NULL = re.compile(r"[A-Za-z_]\w*=."), "__HIVE_DEFAULT_PARTITION__"  # folders that name a column
LINE_BYTES = 64 * 2**20  # of a JSON line, or of a line of a CSV cell: a file without line ends is not read whole
CELL_CHARACTERS = 16 * 2**20  # of a CSV cell: a quote that is never closed


@dataclass(frozen=True)
class ManifestFile:
    """One file of a manifest. groups: rows of each row group (Parquet); columns: the header (CSV)."""

    uri: str
    format: str
    columns: list[str]
    groups: list[int]


def expand(manifests: list[str], storage: Storage) -> list[str]:
    """Paths, URLs, globs and folders -> files, each list entry's in sorted order."""
    found: list[str] = []
    for entry in manifests:
        if storage.is_folder(entry):
            below = visible(storage.files(entry), normal(entry))
            files = [uri for suffix in FORMATS for uri in below if uri.endswith(suffix)]
        elif storage.exists(entry):  # whatever signs its name holds
            files = [entry]
        else:
            files = storage.glob(entry) if GLOB & set(entry) else []
        if not files:
            raise ManifestError(f"{entry}: there is no such manifest (Parquet, JSONL or CSV file, folder or glob)")
        found += files
    return found


def visible(files: list[str], folder: str) -> list[str]:
    """The files below a folder that are meant as data: not what lies in an OUTPUT below it, and none whose name or folder
    begins with a dot or an underscore, as checkpoints, logs and other programs' leavings do. (`_x=1` is a partition.)"""
    outputs = [f"{parent(uri)}/" for uri in files if uri.endswith("/plan.json") and parent(uri) != folder]

    def hidden(uri: str) -> bool:
        names = uri.removeprefix(folder).strip("/").split("/")
        return any(name.startswith((".", "__MACOSX")) or (name.startswith("_") and "=" not in name) for name in names)

    return [uri for uri in files if not hidden(uri) and not uri.startswith(tuple(outputs))]


def open_file(uri: str, storage: Storage) -> ManifestFile:
    """Reads what is needed to cut a file: the Parquet footer, the CSV header."""
    name = uri.rsplit("/", 1)[-1].lower()
    form = next((FORMATS[suffix] for suffix in FORMATS if name.endswith(suffix)), None)
    if form is None:
        raise ManifestError(f"{uri}: the name of a manifest ends in one of {', '.join(FORMATS)}")
    if form == "parquet":
        columns, groups = _parquet(uri, storage, _names_and_groups, "not a readable Parquet file")
        return ManifestFile(uri, form, columns, groups)
    columns = []
    if form == "csv":
        with storage.open(uri) as file:
            columns = next(_csv_records(uri, file, 0))[2]
        _check_separator(uri, columns)
        if repeated := sorted({name for name in columns if columns.count(name) > 1}):
            raise ManifestError(f"{uri}: the header names {', '.join(repeated)} more than once: which is meant?")
    return ManifestFile(uri, form, columns, [])


def _check_separator(uri: str, columns: list[str]) -> None:
    """Raise ManifestError for a header that another separator than the comma divides."""
    for sign, name in ((";", "`;`, as Excel does in many languages"), ("\t", "tabs")):
        if len(columns) == 1 and sign in columns[0]:
            raise ManifestError(f"{uri}: the header is separated by {name}; a CSV manifest needs commas")


def partitions(uri: str) -> dict[str, str | None]:
    """The columns that a file's folders name, as Hive writes them: `num_inference_steps=3/`. A column of the file itself goes
    before them."""
    pairs = [folder.split("=", 1) for folder in uri.split("/")[:-1] if PARTITION.match(folder)]
    return {unquote(name): None if value == HIVE_NULL else unquote(value) for name, value in pairs}


def parquet_schema(uri: str, storage: Storage) -> pa.Schema:
    return _parquet(uri, storage, lambda file: file.schema_arrow, "not a readable Parquet file")


def raw_rows(file: ManifestFile, storage: Storage) -> Iterator[Row]:
    """Read all rows of a manifest file. Memory stays flat."""
    return scan_parquet(file, storage, None) if file.format == "parquet" else (row for *_, row in scan_text(file, storage))


def scan_text(file: ManifestFile, storage: Storage) -> Iterator[tuple[int, int, Row]]:
    """All rows of a JSONL or CSV file with the bytes that each stands in: (begin, end, row). Memory stays flat."""
    folders = partitions(file.uri)
    with storage.open(file.uri) as handle:
        if file.format == "jsonl":
            rows = _json_rows(file.uri, handle, 0)
        else:
            records = _csv_records(file.uri, handle, 0)
            next(records)  # the header
            rows = _csv_rows(file, records)
        for begin, end, row in rows:
            yield begin, end, folders | row


def scan_parquet(file: ManifestFile, storage: Storage, columns: list[str] | None) -> Iterator[Row]:
    """All rows of a Parquet file, these columns of them (None: all)."""
    for group in range(len(file.groups)):
        for batch in _row_group(file, group, storage, columns).to_batches(4096):
            yield from rows_of(batch)


def scan_texts(file: ManifestFile, storage: Storage, columns: list[str]) -> Iterator[Row]:
    """All rows with these columns alone, and of a Parquet file's only the texts in them, not the bytes of images."""

    def texts(opened: pq.ParquetFile, group: int) -> pa.Table:
        leaves = map(opened.schema.column, range(len(opened.schema)))
        chosen = [leaf.path for leaf in leaves if leaf.path.split(".")[0] in columns and str(leaf.logical_type) == "String"]
        return opened.read_row_group(group, chosen)

    if file.format != "parquet":
        yield from ({name: row.get(name) for name in columns} for *_, row in scan_text(file, storage))
    for group in range(len(file.groups)):
        wrong = f"row group {group} cannot be read as Parquet"
        for batch in _parquet(file.uri, storage, partial(texts, group=group), wrong).to_batches(4096):
            yield from batch.to_pylist()


def read_text(file: ManifestFile, shard: Shard, storage: Storage) -> list[Row]:
    """The rows of a shard of a JSONL or CSV file, from its bytes alone."""
    data = storage.read_range(file.uri, shard.offset, shard.size)
    handle, folders = io.BytesIO(data), partitions(file.uri)
    if file.format == "jsonl":
        rows = [folders | row for *_, row in _json_rows(file.uri, handle, shard.first_row)]
    else:
        rows = [folders | row for *_, row in _csv_rows(file, _csv_records(file.uri, handle, shard.first_row + 1))]
    if len(rows) != shard.rows:
        raise ManifestError(f"{file.uri}: {len(rows)} rows where the plan has {shard.rows}: did the file change?")
    return rows


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """The rows of a table. What Python has no value for, such as a time past the year 9999, becomes text."""
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
            return [array.slice(number, 1).to_string() for number in range(len(array))]  # nested: as Arrow prints it


def read_parquet(file: ManifestFile, shard: Shard, storage: Storage) -> pa.Table:
    """Read the rows of a shard of a Parquet file. Its row group stays in this process for the shards that follow: a group
    cannot be entered in the middle, and Ray Data would join the blocks of a task that read it all."""
    key = (file.uri, shard.group, str(storage.fingerprint(file.uri)))  # the file may have changed
    if key not in _last_group:
        _last_group.clear()
        _last_group[key] = _row_group(file, shard.group, storage)
    rows = _last_group[key].slice(shard.first_row, shard.rows)
    if len(rows) != shard.rows:
        raise ManifestError(f"{file.uri}: {len(rows)} rows where the plan has {shard.rows}: did the file change?")
    return rows


_last_group: dict[tuple[str, int, str], pa.Table] = {}


def _row_group(file: ManifestFile, group: int, storage: Storage, columns: list[str] | None = None) -> pa.Table:
    wrong = f"row group {group} cannot be read as Parquet"
    table = _parquet(file.uri, storage, lambda opened: opened.read_row_group(group, columns), wrong)
    for name, value in partitions(file.uri).items():
        if columns is None and name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


def _parquet(uri: str, storage: Storage, read: Callable[[pq.ParquetFile], T], wrong: str) -> T:
    """Raises ManifestError that says what is wrong."""
    try:
        return read_parquet_file(storage, uri, read)
    except NotParquetError as error:
        raise ManifestError(f"{uri}: {wrong}: {error}") from error


def _names_and_groups(file: pq.ParquetFile) -> tuple[list[str], list[int]]:
    """Its columns, and the rows of each row group."""
    return file.schema_arrow.names, [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def _lines(uri: str, handle: BinaryIO) -> Iterator[bytes]:
    """Raises ManifestError for a line that is too long to be one."""
    buffered, begin = io.BufferedReader(handle, 2**20), 0  # type: ignore[type-var]
    while line := buffered.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise ManifestError(
                f"{uri}: the line that begins at byte {begin} is over {LINE_BYTES >> 20} MiB long: is a line a row?"
            )
        begin += len(line)
        yield line


def _json_rows(uri: str, handle: BinaryIO, first: int) -> Iterator[tuple[int, int, Row]]:
    end = 0
    for number, line in enumerate(_lines(uri, handle), first + 1):
        begin, end = end, end + len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{uri}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{uri}: line {number} is not a JSON object but {type(row).__name__}")
        yield begin, end, row


def _constant(name: str) -> float | None:
    """NaN, as pandas writes what is missing, is null."""
    return None if name == "NaN" else float(name)


def _csv_records(uri: str, handle: BinaryIO, first: int) -> Iterator[tuple[int, int, list[str]]]:
    """CSV records with their bytes; a quoted cell may hold line ends."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in _lines(uri, handle):
            text = line.decode("utf-8-sig" if end == 0 else "utf-8")
            end += len(line)
            yield text

    begin, number = 0, first
    csv.field_size_limit(CELL_CHARACTERS)
    try:
        for record in csv.reader(lines(), strict=True):
            number += 1
            if record:
                yield begin, end, record
            begin = end
    except (csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"{uri}: record {number + 1} is not CSV in UTF-8: {error}") from error
    if end == 0 and first == 0:
        raise ManifestError(f"{uri}: the file is empty, it has no header")


def _csv_rows(file: ManifestFile, records: Iterator[tuple[int, int, list[str]]]) -> Iterator[tuple[int, int, Row]]:
    for begin, end, record in records:
        if len(record) != len(file.columns):
            raise ManifestError(
                f"{file.uri}: a record has {len(record)} cells, the header {len(file.columns)}: {','.join(record)[:120]}"
            )
        yield begin, end, {name: cell if cell != "" else None for name, cell in zip(file.columns, record, strict=True)}
