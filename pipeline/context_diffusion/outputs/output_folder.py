"""The OUTPUT folder: its paths, its parts and its counts.

    plan.json  plan/                    written first; OUTPUT belongs to that plan from then on
    images/part-00000/ID-0.png          created before their part
    data/part-00000.parquet             created last: if it exists, the shard is finished
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

from context_diffusion.core.errors import OutputConflictError, StorageError
from context_diffusion.core.records import Counts, part_name
from context_diffusion.core.uris import parent
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import NotParquetError, read_parquet_file

PART = re.compile(r"part-(\d{5,})\.parquet$")

READERS = 16  # threads that read parts
FAILURES_READ = 1000  # failed rows, at most, of which examples are named
AHEAD = 256  # parts read ahead of their use, at most

COUNTED = ["id", "index", "status", "error_code", "flagged", "unsafe", "unknown_words"]


@dataclass(frozen=True)
class Output:
    """The paths of one OUTPUT folder and the content of its parts. `root` has no trailing slash."""

    root: str
    storage: Storage
    # The members of the tar that was read last, by its name.
    _tar: dict[str, dict[str, bytes]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plan(self) -> str:
        return f"{self.root}/plan.json"

    def base(self) -> str:
        """Return the folder of the first manifest file.

        Relative URIs in rows and image metadata are relative to it.
        """
        return base_of(self.read_json(self.plan))

    def read_plan(self) -> Any:
        """Read plan.json. Raises OutputConflictError if an older version of the package wrote it."""
        record = self.read_json(self.plan)
        if "allow" not in record:
            raise OutputConflictError(
                f"{self.root} was planned by an older version of context-diffusion, which this one cannot "
                "read; choose another `output:`"
            )
        return record

    def allow(self) -> list[str]:
        """Return the URI prefixes that its rows may read."""
        return list(self.read_plan()["allow"])

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
        """Return the numbers of the shards whose part exists."""
        names = self.storage.list(f"{self.root}/data")
        return {int(match[1]) for match in map(PART.search, names) if match}

    def read_json(self, uri: str) -> Any:
        return json.loads(self.storage.read(uri))

    def read_parts(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield each finished shard's number and part, in order.

        Raises StorageError if a part is unreadable.
        """
        shards = sorted(self.finished())
        if columns is None:  # parts may contain images: one at a time
            yield from ((shard, self.read_part(shard)) for shard in shards)
            return
        with ThreadPoolExecutor(READERS) as threads:
            for begin in range(0, len(shards), AHEAD):
                batch = shards[begin : begin + AHEAD]
                yield from zip(
                    batch, threads.map(lambda shard: self.read_part(shard, columns), batch), strict=True
                )

    def read_part(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Read a part, or only the given columns. Raises StorageError naming a part that is unreadable."""
        try:
            return read_parquet_file(self.storage, self.part(shard), lambda file: file.read(columns))
        except NotParquetError as error:
            raise StorageError(f"{self.part(shard)}: not a readable Parquet file: {error}") from error

    def ids(self, shard: int) -> list[str]:
        """Return the ids of a finished shard's rows, in the order of the manifest."""
        return list(dict.fromkeys(self.read_part(shard, ["id"])["id"].to_pylist()))

    def image(self, row: dict[str, Any]) -> bytes:
        """Read the image file of a finished row: from the row itself, a tar, or a file of its own."""
        if row.get("image"):
            return bytes(row["image"]["bytes"])
        path, in_tar, member = str(row["file_name"]).partition(".tar/")
        if not in_tar:
            return self.storage.read(f"{self.root}/{path}")
        if path not in self._tar:
            self._tar.clear()
            self._tar[path] = dict(members(self.storage.read(f"{self.root}/{path}.tar")))
        return self._tar[path][member]

    def failures(self, most: int) -> list[dict[str, str]]:
        """Return id, error_code and error_message of the first failed rows, each message once, at most
        `most`, of the first FAILURES_READ."""
        columns = ["id", "error_code", "error_message"]
        failures: dict[tuple[str, str], dict[str, str]] = {}
        count = 0
        for _, part in self.read_parts([*columns, "status"]):
            rows = part.filter(pc.equal(part["status"], "failed")).select(columns).to_pylist()
            for row in rows:
                failures.setdefault((row["error_code"], row["error_message"]), row)
            count += len(rows)
            if len(failures) >= most or count >= FAILURES_READ:
                break
        return list(failures.values())[:most]

    def unknown_words(self, most: int) -> list[str]:
        """Return the first words of prompts that have no effect, each once, at most `most`."""
        words: dict[str, None] = {}
        for _, part in self.read_parts(["unknown_words"]):
            if "unknown_words" in part.column_names:
                words |= dict.fromkeys(pc.list_flatten(part["unknown_words"]).to_pylist())
            if len(words) >= most:
                break
        return list(words)[:most]

    def count(self) -> Counts:
        """Count rows (ids) and images over all finished parts."""
        return sum((counts_of(part) for _, part in self.read_parts(COUNTED)), Counts())


def base_of(plan: Any) -> str:
    """Return the folder that relative URIs are relative to. plan: the content of plan.json."""
    return parent(plan["manifest"][0]["uri"])


def counts_of(part: pa.Table) -> Counts:
    """Count the rows and images of a part. It needs the columns COUNTED only."""
    images = part.to_pylist()
    failed = [image for image in images if image["status"] == "failed"]
    rows = len({image["id"] for image in images})
    failed_rows = len({image["id"] for image in failed})
    codes = Counter(image["error_code"] for image in failed)
    marked = {name: sum(image.get(name) is True for image in images) for name in ("flagged", "unsafe")}
    marked["unknown_words"] = len({image["id"] for image in images if image.get("unknown_words")})
    return Counts(rows, rows - failed_rows, failed_rows, len(images) - len(failed), dict(codes), **marked)


def members(tar: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file in a tar."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        for member in opened:
            file = opened.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def to_tar(files: dict[str, bytes]) -> bytes:
    """Write files to a tar without times and owners: equal files give equal bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()
