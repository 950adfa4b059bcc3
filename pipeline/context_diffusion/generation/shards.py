"""Read and write the planned shards of OUTPUT: a Parquet file and an entry in plan.json for each manifest
file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.core.records import Shard
from context_diffusion.core.uris import normal
from context_diffusion.inputs.manifest_scan import Scan
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet

SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("number", "file", "first_row", "rows", "group", "offset", "size")]
)


def read_shards(output: Output, file: int) -> Iterator[Shard]:
    """Read the shards of one manifest file."""
    table = pq.read_table(io.BytesIO(output.storage.read(output.shards(file))))
    for batch in table.to_batches(4096):
        columns = [batch.column(name).to_pylist() for name in SCHEMA.names]
        yield from (Shard(*values) for values in zip(*columns, strict=True))


def write_shards(output: Output, file: int, shards: list[Shard]) -> None:
    """Write the shards of one manifest file, replacing earlier ones."""
    data = to_parquet(pa.Table.from_pylist([vars(shard) for shard in shards], SCHEMA))
    output.storage.replace(output.shards(file), data)


def file_record(scanned: Scan, number: int, shards: int) -> dict[str, Any]:
    """Return a manifest file's entry in plan.json, with the fingerprint of its present version."""
    file = scanned.files[number]
    return {
        "uri": normal(file.uri),
        "format": file.format,
        "columns": file.columns or scanned.keys[number],
        "groups": file.groups,
        "rows": scanned.rows_of[number],
        "digest": scanned.digests[number],
        "shards": shards,
        **scanned.storage.fingerprint(file.uri),
    }
