"""Finished parts: read in order by several threads, of each only what is asked for, a torn one named."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from context_diffusion.core.errors import StorageError
from context_diffusion.outputs.output_folder import COUNTED, Output
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import to_parquet

PICTURE = {"bytes": bytes(range(256)) * 400, "path": None}


def write(folder: Path, parts: int) -> Output:
    output = Output(str(folder), Storage(deadline_s=20))
    for shard in range(parts):
        rows = [
            {"id": f"{shard}-{n}", "index": 0, "status": "ok", "error_code": None, "image": PICTURE}
            for n in range(9)
        ]
        output.storage.create(output.part(shard), to_parquet(pa.Table.from_pylist(rows), ("image",)))
    return output


def test_parts_come_in_order_and_are_counted(tmp_path: Path) -> None:
    output = write(tmp_path, 300)
    seen = [(shard, part["id"][0].as_py()) for shard, part in output.read_parts(COUNTED)]
    assert seen == [(shard, f"{shard}-0") for shard in range(300)]
    assert (output.count().rows, output.count().images) == (2700, 2700)


def test_counting_does_not_read_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, read = write(tmp_path, 1), []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read.append(len(data := super().read(size)))
            return data

    whole = Path(output.part(0)).read_bytes()
    monkeypatch.setattr(Storage, "parse", lambda _self, _uri, parse: parse(Counting(whole)))
    assert output.count().rows == 9
    assert 0 < sum(read) < len(whole) / 5


@pytest.mark.parametrize("damage", ["cut", "thrift", "pages"])
def test_a_torn_part_is_named_at_once(tmp_path: Path, damage: str) -> None:
    output: Any = write(tmp_path, 3)
    path = Path(output.part(1))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-20:]
    elif damage == "thrift":
        data[-200:-100] = b"\xff" * 100
    else:
        data[4:90] = b"\xff" * 86
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"part-00001\.parquet: not a readable Parquet file"):
        output.count()
    assert time.monotonic() - started < 10, "it was tried again, in vain"


def test_of_failed_rows_each_reason_is_shown_once(tmp_path: Path) -> None:
    output = Output(str(tmp_path), Storage(deadline_s=20))
    reasons = [None, "gone", "gone", "torn", "gone", "wide", "tall"]
    for shard, reason in enumerate(reasons):
        status = "failed" if reason else "ok"
        row = {"id": str(shard), "status": status, "error_code": "missing_file", "error_message": reason}
        output.storage.create(output.part(shard), to_parquet(pa.Table.from_pylist([row])))
    assert [row["id"] for row in output.failures(3)] == ["1", "3", "5"]
    assert [row["error_message"] for row in output.failures(9)] == ["gone", "torn", "wide", "tall"]


def test_a_job_whose_rows_all_fail_alike_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "a", "status": "failed", "error_code": "missing_file", "error_message": "gone"}
    read: list[int] = []

    def parts(_self: Output, _columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        for shard in range(9):
            read.append(shard)
            yield shard, pa.Table.from_pylist([row] * 500)

    monkeypatch.setattr(Output, "read_parts", parts)
    assert len(Output(str(tmp_path), Storage()).failures(3)) == 1
    assert read == [0, 1]
