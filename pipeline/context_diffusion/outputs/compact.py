"""Merges many small parts into few large Parquet files that contain the images, and checks every row.

The files depend on OUTPUT and the options alone, so rerunning the same command resumes an interrupted one.
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

FILE_BYTES = 256 * 2**20  # a file is closed at this size, or at the given number of rows
THREADS = 16


@dataclass
class _RowDigest:
    """Counts rows and sums their hashes. Equal sums mean equal rows, in any order and any files."""

    rows: int = 0
    sum: int = 0

    def add(self, table: pa.Table) -> None:
        for row in table.select(sorted(table.column_names)).to_pylist():
            row_hash = hashlib.blake2b(repr(row).encode("utf-8", "replace")).digest()
            self.rows += 1
            self.sum = (self.sum + int.from_bytes(row_hash)) % 2**512


def compact(output: Output, to: Output, rows: int = 10_000) -> dict[str, Any]:
    """Write OUTPUT to `to` as part-00000.parquet, ..., and _SUCCESS.

    Returns the folder and the rows and files written.

    Raises JobError if OUTPUT is not finished, OutputConflictError if `to` holds something else, and
    StorageError if the rows read back differ from those of OUTPUT.
    """
    if not output.storage.exists(output.success):
        raise JobError(f"{output.root} is not finished: it has no _SUCCESS; rerun its job, then this command")
    origin = {"source": output.root, "digest": output.storage.read(output.success).decode().strip()}
    _claim(to, origin | {"rows": rows})
    source_digest = _RowDigest()
    written_digest = _RowDigest()
    files = 0
    for table in _file_tables(output, rows, source_digest):
        uri = f"{to.root}/{part_name(files)}.parquet"
        to.storage.create(uri, to_parquet(table, ("image",)))
        written_digest.add(pq.read_table(io.BytesIO(to.storage.read(uri))))
        files += 1
    if source_digest != written_digest:
        raise StorageError(
            f"{to.root}: its {written_digest.rows} rows differ from the {source_digest.rows} rows "
            f"of {output.root}; delete it and rerun this command"
        )
    counts = {"rows": source_digest.rows, "files": files}
    to.storage.replace(to.success, json.dumps(origin | counts).encode())
    return {"output": to.root, **counts}


def _claim(to: Output, origin: dict[str, Any]) -> None:
    """Bind `to` to one OUTPUT and one set of options, before its first file. Raises OutputConflictError."""
    uri = f"{to.root}/compact.json"
    data = json.dumps(origin).encode()
    if not to.storage.exists(uri) and to.storage.files(to.root):
        raise OutputConflictError(f"{to.root} is not empty; choose another folder")
    if not to.storage.create(uri, data) and to.storage.read(uri) != data:
        raise OutputConflictError(
            f"{to.root} was written from another OUTPUT or with other options; choose another folder"
        )


def _file_tables(output: Output, rows: int, source_digest: _RowDigest) -> Iterator[pa.Table]:
    """Yield one table per file, of at most `rows` rows and about FILE_BYTES. Adds each part to the digest."""
    pending: list[pa.Table] = []
    for part in _parts_with_images(output):
        source_digest.add(part)
        rest = part
        while len(rest):
            pending.append(rest.slice(0, rows - sum(map(len, pending))))
            rest = rest.slice(len(pending[-1]))
            if sum(map(len, pending)) == rows or sum(table.nbytes for table in pending) >= FILE_BYTES:
                yield pa.concat_tables(pending)
                pending = []
    if pending:
        yield pa.concat_tables(pending)


def _parts_with_images(output: Output) -> Iterator[pa.Table]:
    """Yield OUTPUT's parts with the images in the column `image`, as `datasets` decodes it."""
    with ThreadPoolExecutor(THREADS) as threads:
        for _, part in output.read_parts():
            names = [name for name in ("file_name", "image", "status") if name in part.column_names]
            rows = part.select(names).to_pylist()

            def image_of(row: dict[str, Any]) -> dict[str, Any] | None:
                return (
                    {"bytes": output.image(row), "path": row["file_name"]} if row["status"] == "ok" else None
                )

            in_tar = any(".tar/" in (row["file_name"] or "") for row in rows)
            images = list(map(image_of, rows)) if in_tar else list(threads.map(image_of, rows))
            columns = part.drop_columns(["image"]) if "image" in part.column_names else part
            with_images = columns.append_column("image", pa.array(images, FILE))
            yield with_images.replace_schema_metadata(HUGGING_FACE)
