"""The OUTPUT folder: where each thing lies and what is finished.

    plan.json  plan/                    written first; OUTPUT belongs to that plan from then on
    images/part-00000/ID-0.png          created before their part
    data/part-00000.parquet             created last for a shard: it exists = the shard is finished
    summary.json  report.html  checksums.parquet  _SUCCESS    (outputs/finalize.py)

Knows storage, not Ray.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.errors import StorageError
from context_diffusion.core.records import Counts, part_name
from context_diffusion.core.uris import parent
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import NotParquetError, read_parquet_file

PART = re.compile(r"part-(\d{5,})\.parquet$")

READERS, AHEAD = 16, 256  # threads that read parts, and how many parts at most wait to be looked at

COUNTED = ["id", "index", "status", "error_code", "flagged", "unsafe"]


@dataclass(frozen=True)
class Output:
    """The paths of one OUTPUT folder and what may be asked of it. `root` has no slash at its end."""

    root: str
    storage: Storage
    _tar: dict[str, dict[str, bytes]] = field(default_factory=dict, compare=False, repr=False)  # the last one that was read

    @property
    def plan(self) -> str:
        return f"{self.root}/plan.json"

    def base(self) -> str:
        """The folder of its first manifest file: what its rows and pictures say of local sources is relative to it."""
        return parent(self.read_json(self.plan)["manifest"][0]["uri"])

    def allow(self) -> list[str]:
        """Return the URI prefixes that its rows may read."""
        return list(self.read_json(self.plan)["allow"])

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
        shards = sorted(self.finished())
        if columns is None:  # with their pictures: one at a time
            yield from ((shard, self.read_part(shard)) for shard in shards)
            return
        with ThreadPoolExecutor(READERS) as threads:
            for begin in range(0, len(shards), AHEAD):
                batch = shards[begin : begin + AHEAD]
                yield from zip(batch, threads.map(lambda shard: self.read_part(shard, columns), batch), strict=True)

    def read_part(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """These columns alone are read, where some are named. Raises StorageError naming the part that cannot be read."""
        try:
            return read_parquet_file(self.storage, self.part(shard), lambda file: file.read(columns))
        except NotParquetError as error:
            raise StorageError(f"{self.part(shard)}: not a readable Parquet file: {error}") from error

    def ids(self, shard: int) -> list[str]:
        """The ids of a finished shard's rows, in their order in the manifest."""
        return list(dict.fromkeys(self.read_part(shard, ["id"])["id"].to_pylist()))

    def picture(self, row: dict[str, Any]) -> bytes:
        """A finished row's picture file: from the row itself, a tar, or a file of its own."""
        if row.get("image"):
            return bytes(row["image"]["bytes"])
        tar, inside, name = str(row["file_name"]).partition(".tar/")
        if not inside:
            return self.storage.read(f"{self.root}/{tar}")
        if tar not in self._tar:
            self._tar.clear()
            self._tar[tar] = dict(members(self.storage.read(f"{self.root}/{tar}.tar")))
        return self._tar[tar][name]

    def failures(self, most: int) -> list[dict[str, str]]:
        """The first rows that failed: id, error_code, error_message."""
        columns, found = ["id", "error_code", "error_message"], list[dict[str, str]]()
        for _, part in self.read_parts([*columns, "status"]):
            found += part.filter(pc.equal(part["status"], "failed")).select(columns).to_pylist()
            if len(found) >= most:
                break
        return found[:most]

    def count(self) -> Counts:
        """Counts rows (ids) and images over all finished parts."""
        return sum((counts_of(part) for _, part in self.read_parts(COUNTED)), Counts())


def counts_of(part: pa.Table) -> Counts:
    """Of a part's columns COUNTED."""
    rows, ids = part.to_pylist(), part["id"].to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    lost, codes = len({row["id"] for row in failed}), Counter(row["error_code"] for row in failed)
    marked = {name: sum(row.get(name) is True for row in rows) for name in ("flagged", "unsafe")}
    return Counts(total := len(set(ids)), total - lost, lost, len(rows) - len(failed), dict(codes), **marked)


def members(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """A tar's files: (name, bytes)."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for member in opened:
            if (file := opened.extractfile(member)) is not None:
                yield member.name, file.read()


def to_tar(files: dict[str, bytes]) -> bytes:
    """Equal bytes for equal files: no time, no owner."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()
