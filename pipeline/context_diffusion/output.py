"""The OUTPUT folder: where each thing lies, what is finished, and how it is closed.

    plan.json  plan/                    written first; OUTPUT belongs to that plan from then on
    images/part-00000/ID-0.png          created before their part
    data/part-00000.parquet             created last for a shard: it exists = the shard is finished
    summary.json  report.html  checksums.parquet  _SUCCESS

Knows storage, not Ray.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.errors import StorageError
from context_diffusion.schema import Counts, part_name
from context_diffusion.storage import Storage

PART = re.compile(r"part-(\d{5,})\.parquet$")
COUNTED = ["id", "index", "status", "error_code"]


@dataclass(frozen=True)
class Output:
    """The paths of one OUTPUT folder and what may be asked of it. `root` has no slash at its end."""

    root: str
    storage: Storage

    @property
    def plan(self) -> str:
        return f"{self.root}/plan.json"

    @property
    def success(self) -> str:
        return f"{self.root}/_SUCCESS"

    @property
    def summary(self) -> str:
        return f"{self.root}/summary.json"

    @property
    def report(self) -> str:
        return f"{self.root}/report.html"

    @property
    def checksums(self) -> str:
        return f"{self.root}/checksums.parquet"

    def shards(self, file: int) -> str:
        return f"{self.root}/plan/{file:05d}.parquet"

    def part(self, shard: int) -> str:
        return f"{self.root}/data/{part_name(shard)}.parquet"

    def finished(self) -> set[int]:
        """The numbers of the shards whose part exists."""
        names = self.storage.list(f"{self.root}/data")
        return {int(match[1]) for match in map(PART.search, names) if match}

    def read_json(self, uri: str) -> Any:
        return json.loads(self.storage.read(uri))

    def read_parts(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """The parts in order, each with its shard's number. Raises StorageError with the part that cannot be read."""
        for shard in sorted(self.finished()):
            data = self.storage.read(self.part(shard))
            try:
                yield shard, pq.read_table(io.BytesIO(data), columns=columns)
            except (pa.ArrowInvalid, OSError) as error:
                raise StorageError(f"{self.part(shard)}: not a readable Parquet file: {error}") from error

    def count(self) -> Counts:
        """Counts rows (ids) and images over all finished parts."""
        total = Counts()
        for _, part in self.read_parts(COUNTED):
            failed = {row["id"] for row in part.to_pylist() if row["status"] == "failed"}
            total.rows += len(set(part["id"].to_pylist()))
            total.failed += len(failed)
            for row in part.to_pylist():
                if row["status"] == "ok":
                    total.images += 1
                else:
                    total.codes[row["error_code"]] = total.codes.get(row["error_code"], 0) + 1
        total.ok = total.rows - total.failed
        return total

    def close(self) -> None:
        """Writes checksums.parquet and then, last of all, _SUCCESS with its digest."""
        rows: list[tuple[str, int | None, str]] = []
        for shard in sorted(self.finished()):
            data = self.storage.read(self.part(shard))
            rows.append((f"data/{part_name(shard)}.parquet", len(data), hashlib.sha256(data).hexdigest()))
            table = pq.read_table(io.BytesIO(data), columns=["file_name", "sha256"])
            files = zip(table["file_name"].to_pylist(), table["sha256"].to_pylist(), strict=True)
            rows += [(name, None, digest) for name, digest in files if name]
        names, sizes, digests = zip(*rows, strict=True) if rows else ((), (), ())
        table = pa.table(
            {
                "file_name": pa.array(names, pa.string()),
                "bytes": pa.array(sizes, pa.int64()),
                "sha256": pa.array(digests, pa.string()),
            }
        )
        data = to_parquet(table)
        self.storage.replace(self.checksums, data)
        self.storage.replace(self.success, hashlib.sha256(data).hexdigest().encode() + b"\n")

    def verify(self) -> list[str]:
        """What is wrong with a finished OUTPUT, a line each; empty where every byte is as it was written."""
        if not self.storage.exists(self.success):
            return [f"{self.success}: missing, the job is not finished"]
        wrong = []
        data = self.storage.read(self.checksums)
        if hashlib.sha256(data).hexdigest().encode() != self.storage.read(self.success).strip():
            wrong.append(f"{self.checksums}: does not match _SUCCESS")
        for row in pq.read_table(io.BytesIO(data)).to_pylist():
            uri = f"{self.root}/{row['file_name']}"
            if not self.storage.exists(uri):
                wrong.append(f"{uri}: missing")
            elif hashlib.sha256(self.storage.read(uri)).hexdigest() != row["sha256"]:
                wrong.append(f"{uri}: its bytes changed")
        plan = self.read_json(self.plan)
        rows = self.count().rows
        if rows != plan["rows"]:
            wrong.append(f"{self.root}: {rows} rows in data/, {plan['rows']} in the manifest")
        return wrong


def to_parquet(table: pa.Table, binary: tuple[str, ...] = ()) -> bytes:
    """The bytes of a Parquet file; columns in `binary` hold compressed pictures: no dictionary, no compression."""
    sink = io.BytesIO()
    compression = {name: "NONE" if name.split(".")[0] in binary else "ZSTD" for name in _leaves(table.schema)}
    dictionary = [name for name in compression if compression[name] != "NONE"]
    pq.write_table(table, sink, compression=compression, use_dictionary=dictionary)
    return sink.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the leaf columns, as Parquet names them."""
    sink = io.BytesIO()
    pq.write_metadata(schema, sink)
    parquet = pq.ParquetFile(io.BytesIO(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
