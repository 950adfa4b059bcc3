"""Many small parts -> few large Parquet files with the pictures in them, by a column's values if asked; checked row by row.

What is written follows from OUTPUT and the options alone, so a run that was broken off is taken up by the same command.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from context_diffusion.core.errors import JobError, OutputConflictError, StorageError
from context_diffusion.core.records import part_name
from context_diffusion.core.schema import FILE, HUGGING_FACE
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet

FILE_BYTES = 256 * 2**20  # a file is closed when it holds so much, or `rows`
HELD_BYTES = 2**30  # of all files that are open, one for each value of the column
THREADS = 16
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # Hive's name for null, which pyarrow, DuckDB (1.5 on) and Spark read


@dataclass
class _File:
    """What waits to become one file."""

    tables: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0

    def add(self, table: pa.Table) -> None:
        self.tables.append(table)
        self.rows += len(table)
        self.bytes += table.nbytes


@dataclass
class _Sum:
    """Rows and the sum of their digests: equal sums are equal rows, in whatever order and files they stand."""

    rows: int = 0
    digest: int = 0

    def add(self, table: pa.Table) -> None:
        for row in table.select(sorted(table.column_names)).to_pylist():
            self.rows += 1
            self.digest = (self.digest + int.from_bytes(hashlib.blake2b(repr(row).encode("utf-8", "replace")).digest())) % 2**512


def compact(output: Output, to: Output, rows: int = 10_000, partition_by: str | None = None) -> dict[str, Any]:
    """OUTPUT -> `to`: part-00000.parquet, ..., or COLUMN=VALUE/part-00000.parquet, and _SUCCESS. -> what was written.

    Raises JobError where OUTPUT is not finished or lacks the column, OutputConflictError where `to` holds something else,
    StorageError where what was written does not read back as what was read.
    """
    if not output.storage.exists(output.success):
        raise JobError(f"{output.root} is not finished, it has no _SUCCESS: run its job again, then this")
    _, first = next(output.read_parts())
    if partition_by and partition_by not in first.column_names:
        there = ", ".join(first.column_names)
        raise JobError(f"--partition-by: {output.root} has no column {partition_by!r}; there are {there}")
    made_of = {"source": output.root, "digest": output.storage.read(output.success).decode().strip()}
    _claim(to, made_of | {"rows": rows, "partition_by": partition_by})
    read, written, files = _Sum(), _Sum(), list[str]()
    for value, number, table in _gathered(output, rows, partition_by, read):
        files.append(f"{_folder(partition_by, value)}{part_name(number)}.parquet")
        stored = table.drop_columns([partition_by]) if partition_by else table
        to.storage.create(f"{to.root}/{files[-1]}", to_parquet(stored, ("image",)))
        again = pq.read_table(io.BytesIO(to.storage.read(f"{to.root}/{files[-1]}")))
        if partition_by:
            again = again.append_column(
                table.schema.field(partition_by), pa.array([value] * len(again), table[partition_by].type)
            )
        written.add(again)
    if read != written:
        raise StorageError(
            f"{to.root}: its {written.rows} rows are not the {read.rows} of {output.root}; remove it and run this again"
        )
    told = {"rows": read.rows, "files": len(files)}
    to.storage.replace(to.success, json.dumps(made_of | told).encode())
    return {"output": to.root, **told}


def _claim(to: Output, made_of: dict[str, Any]) -> None:
    """`to` belongs to one OUTPUT and one set of options from its first file on."""
    uri, data = f"{to.root}/compact.json", json.dumps(made_of).encode()
    if not to.storage.exists(uri) and to.storage.files(to.root):
        raise OutputConflictError(f"{to.root} is not empty; choose another folder")
    if not to.storage.create(uri, data) and to.storage.read(uri) != data:
        raise OutputConflictError(f"{to.root} was made of another OUTPUT or with other options; choose another folder")


def _folder(partition_by: str | None, value: Any) -> str:
    if partition_by is None:
        return ""
    return f"{partition_by}={NO_VALUE if value is None else quote(str(value), safe='')}/"


def _gathered(output: Output, rows: int, partition_by: str | None, read: _Sum) -> Iterator[tuple[Any, int, pa.Table]]:
    """(value, number of its file, table): each as large as a file should be, or smaller where too many are open."""
    waiting: dict[Any, _File] = {}
    numbers: Counter[Any] = Counter()

    def close(value: Any) -> tuple[Any, int, pa.Table]:
        numbers[value] += 1
        return value, numbers[value] - 1, pa.concat_tables(waiting.pop(value).tables)

    for table in _parts(output):
        read.add(table)
        for value, part in _by_value(table, partition_by):
            for begin in range(0, len(part), rows):
                waiting.setdefault(value, _File()).add(part.slice(begin, rows))
                if waiting[value].rows >= rows or waiting[value].bytes >= FILE_BYTES:
                    yield close(value)
        while sum(file.bytes for file in waiting.values()) > HELD_BYTES:
            yield close(max(waiting, key=lambda value: waiting[value].bytes))
    for value in list(waiting):
        yield close(value)


def _by_value(table: pa.Table, partition_by: str | None) -> Iterator[tuple[Any, pa.Table]]:
    if partition_by is None:
        yield None, table
        return
    column = table[partition_by]
    for value in dict.fromkeys(column.to_pylist()):
        yield value, table.filter(pc.is_null(column) if value is None else pc.equal(column, value))


def _parts(output: Output) -> Iterator[pa.Table]:
    """OUTPUT's parts with their pictures in the column `image`, as `datasets` decodes it."""
    with ThreadPoolExecutor(THREADS) as threads:
        for _, part in output.read_parts():
            rows = part.select([name for name in ("file_name", "image", "status") if name in part.column_names]).to_pylist()

            def stored(row: dict[str, Any]) -> dict[str, Any] | None:
                return {"bytes": output.picture(row), "path": row["file_name"]} if row["status"] == "ok" else None

            in_tar = any(".tar/" in (row["file_name"] or "") for row in rows)
            images = list(map(stored, rows)) if in_tar else list(threads.map(stored, rows))
            kept = part.drop_columns(["image"]) if "image" in part.column_names else part
            yield kept.append_column("image", pa.array(images, FILE)).replace_schema_metadata(HUGGING_FACE)
