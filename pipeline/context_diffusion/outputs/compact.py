"""Many small parts -> few large Parquet files with the pictures in them, checked row by row.

What is written follows from OUTPUT and the options alone, so a run that was broken off is taken up by the same command.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.core.errors import JobError, OutputConflictError, StorageError
from context_diffusion.core.records import part_name
from context_diffusion.core.schema import FILE, HUGGING_FACE
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet

FILE_BYTES = 256 * 2**20  # a file is closed when it holds so much, or `rows`
THREADS = 16


@dataclass
class _Sum:
    """Rows and the sum of their digests: equal sums are equal rows, in whatever files they stand."""

    rows: int = 0
    digest: int = 0

    def add(self, table: pa.Table) -> None:
        for row in table.select(sorted(table.column_names)).to_pylist():
            self.rows += 1
            self.digest = (self.digest + int.from_bytes(hashlib.blake2b(repr(row).encode("utf-8", "replace")).digest())) % 2**512


def compact(output: Output, to: Output, rows: int = 10_000) -> dict[str, Any]:
    """Write OUTPUT to `to` as part-00000.parquet, ..., and _SUCCESS. Returns what was written.

    Raises JobError where OUTPUT is not finished, OutputConflictError where `to` holds something else, StorageError where what
    was written does not read back as what was read.
    """
    if not output.storage.exists(output.success):
        raise JobError(f"{output.root} is not finished, it has no _SUCCESS: run its job again, then this")
    made_of = {"source": output.root, "digest": output.storage.read(output.success).decode().strip()}
    _claim(to, made_of | {"rows": rows})
    read, written, files = _Sum(), _Sum(), 0
    for number, table in enumerate(_gathered(output, rows, read)):
        uri = f"{to.root}/{part_name(number)}.parquet"
        to.storage.create(uri, to_parquet(table, ("image",)))
        written.add(pq.read_table(io.BytesIO(to.storage.read(uri))))
        files = number + 1
    if read != written:
        raise StorageError(
            f"{to.root}: its {written.rows} rows are not the {read.rows} of {output.root}; remove it and run this again"
        )
    counts = {"rows": read.rows, "files": files}
    to.storage.replace(to.success, json.dumps(made_of | counts).encode())
    return {"output": to.root, **counts}


def _claim(to: Output, made_of: dict[str, Any]) -> None:
    """`to` belongs to one OUTPUT and one set of options from its first file on."""
    uri, data = f"{to.root}/compact.json", json.dumps(made_of).encode()
    if not to.storage.exists(uri) and to.storage.files(to.root):
        raise OutputConflictError(f"{to.root} is not empty; choose another folder")
    if not to.storage.create(uri, data) and to.storage.read(uri) != data:
        raise OutputConflictError(f"{to.root} was made of another OUTPUT or with other options; choose another folder")


def _gathered(output: Output, rows: int, read: _Sum) -> Iterator[pa.Table]:
    """Tables as large as a file should be: of `rows`, or fewer where they are FILE_BYTES. read: sums up what comes in."""
    waiting: list[pa.Table] = []
    for table in _parts(output):
        read.add(table)
        while len(table):
            waiting.append(table.slice(0, rows - sum(map(len, waiting))))
            table = table.slice(len(waiting[-1]))
            if sum(map(len, waiting)) == rows or sum(part.nbytes for part in waiting) >= FILE_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


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
