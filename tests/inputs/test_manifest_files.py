from __future__ import annotations

import csv
import io
import json
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from context_diffusion.core.errors import ErrorCode, ManifestError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard, derive_seed
from context_diffusion.core.schema import PASSED, READ
from context_diffusion.inputs.manifest_files import (
    expand,
    open_file,
    read_parquet,
    read_text,
    scan_parquet,
    scan_text,
)
from context_diffusion.inputs.rows import RowRules, read_table
from context_diffusion.inputs.unique_ids import UniqueIds, name_duplicates
from context_diffusion.storage.filesystem import Storage

STORAGE = Storage(deadline_s=2)
JOB = GenerateJob(kind="generate", manifest="m.csv", output="out")
ROW: dict[str, Any] = {"id": "a", "query": "q.png", "context": ["c.png"], "prompt": "fog"}


def read(row: dict[str, Any], job: GenerateJob = JOB, passed: pa.Schema | None = None) -> dict[str, Any]:
    return read_table([row], 3, RowRules.of_job(job), "/data", passed or pa.schema([])).to_pylist()[0]


def shards_of(uri: str, size: int) -> list[list[dict[str, Any]]]:
    """Cuts a text file as the plan does and reads each shard by its bytes alone."""
    file = open_file(uri, STORAGE)
    bounds, end = [], 0
    for begin, end, _ in scan_text(file, STORAGE):  # noqa: B007
        bounds.append(begin)
    bounds.append(end)
    rows = len(bounds) - 1
    cuts = [(i, min(size, rows - i)) for i in range(0, rows, size)]
    return [
        read_text(file, Shard(n, 0, i, k, 0, bounds[i], bounds[i + k] - bounds[i]), STORAGE)
        for n, (i, k) in enumerate(cuts)
    ]


cell = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=8)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    rows=st.lists(st.tuples(cell, cell), max_size=9),
    size=st.integers(1, 4),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_shards_put_together_are_the_file(
    tmp_path: Path, rows: list[tuple[str, str]], size: int, bom: bool, end: str
) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerows([("id", "prompt"), *rows])
    path = tmp_path / "m.csv"
    path.write_bytes(sink.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    found = [(row["id"] or "", row["prompt"] or "") for shard in shards_of(str(path), size) for row in shard]
    assert found == rows


@quick
@given(
    prompts=st.lists(cell | st.none(), max_size=9),
    size=st.integers(1, 4),
    blank=st.sampled_from(["", "\n", " \n\n"]),
)
def test_jsonl_shards_put_together_are_the_file(
    tmp_path: Path, prompts: list[str | None], size: int, blank: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        blank.join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts), "utf-8", newline=""
    )
    assert [row["prompt"] for shard in shards_of(str(path), size) for row in shard] == prompts


def test_parquet_shards_come_in_order_and_only_the_wanted(tmp_path: Path) -> None:
    uri = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({"id": [str(n) for n in range(25)]}), uri, row_group_size=10)
    file = open_file(uri, STORAGE)
    assert file.groups == [10, 10, 5]
    wanted = [Shard(4, 0, 0, 4, 1), Shard(6, 0, 8, 2, 1)]
    got = [read_parquet(file, shard, STORAGE)["id"].to_pylist() for shard in wanted]
    assert got == [["10", "11", "12", "13"], ["18", "19"]]
    assert read_parquet(file, Shard(0, 0, 0, 2, 0), STORAGE)["id"].to_pylist() == ["0", "1"]
    with pytest.raises(ManifestError, match="did the file change"):
        read_parquet(file, Shard(9, 0, 3, 9, 2), STORAGE)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("m.jsonl", b'{"id": 1}\nnot json\n', "line 2"),
        ("m.jsonl", b"[1]\n", "line 1"),
        ("m.csv", b"id,query\na,b,c\n", "3 cells"),
        ("m.csv", b"", "empty"),
        ("m.csv", b'id,query\na,"b\n' + b"never closed, " * 2**21, "record 2"),
        ("m.csv", b"id," + b"a" * 2**27, "begins at byte 0 is over 64 MiB"),
        ("m.jsonl", b'{"id": 1}\n{"id": "' + b"a" * 2**27, "begins at byte 10 is over 64 MiB"),
        ("m.jsonl", b'{"id": 1}\n' * 999_999 + b'{"id": 2\n', "line 1000000 is not JSON"),
        ("m.jsonl", b'{"id": 1}\n' + b"[" * 100_000, "line 2"),
        ("m.parquet", b"PAR1 no", "Parquet"),
        ("m.xml", b"<a/>", "ends in one of"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=match) as caught:
        deque(scan_text(open_file(str(tmp_path / name), STORAGE), STORAGE), maxlen=0)
    assert name in str(caught.value)


def test_a_damaged_page_is_told_with_its_file_and_row_group(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = pa.table(
        {"id": [f"{n:04d}" for n in range(1000)], "prompt": [f"{n} words of it" * 9 for n in range(1000)]}
    )
    pq.write_table(table, path, row_group_size=500, compression="ZSTD")
    data, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(1).column(1)
    begin = column.data_page_offset + 40
    data[begin : begin + 200] = bytes(200)
    path.write_bytes(data)
    file = open_file(str(path), STORAGE)
    assert len(read_parquet(file, Shard(0, 0, 0, 500, 0), STORAGE)) == 500
    with pytest.raises(ManifestError, match=r"m\.parquet: row group 1 cannot be read"):
        read_parquet(file, Shard(1, 0, 0, 500, 1), STORAGE)


def test_globs_folders_and_nothing_found(tmp_path: Path, s3: str) -> None:
    for name in ("b.csv", "a.csv", "c.jsonl"):
        (tmp_path / name).write_text("id\n")
    assert expand([f"{tmp_path}/*.csv"], STORAGE) == [f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"]
    assert len(expand([str(tmp_path)], STORAGE)) == 3
    STORAGE.replace(f"{s3}/in/a.csv", b"id\n")
    assert expand([f"{s3}/in/*.csv"], STORAGE) == expand([f"{s3}/in"], STORAGE) == [f"{s3}/in/a.csv"]
    with pytest.raises(ManifestError, match="none"):
        expand([f"{tmp_path}/none*.csv"], STORAGE)


def test_a_row_as_read() -> None:
    row = read(ROW | {"guidance_scale": 3.0})
    assert row["id"] == "a"
    assert row["query"] == {"bytes": None, "path": "/data/q.png"}
    assert row["context"] == [{"bytes": None, "path": "/data/c.png"}]
    used = json.loads(row["settings"])
    assert used["guidance_scale"] == 3.0
    assert used["seed"] == derive_seed(0, "a")
    assert row["error_code"] is None


def test_csv_cells_mean_what_typed_values_mean() -> None:
    text = {
        "num_inference_steps": "7",
        "strength": "0.5",
        "context_weights": "[1, 2]",
        "scheduler": "euler",
        "seed": "9",
    }
    typed = {
        "num_inference_steps": 7,
        "strength": 0.5,
        "context_weights": [1, 2],
        "scheduler": "euler",
        "seed": 9,
    }
    assert read(ROW | text | {"context": '["c.png"]'}) == read(ROW | typed)
    assert read(ROW | {"context": "c.png"}) == read(ROW)


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (
            {"context": ["a.png"] * 10_000},
            ErrorCode.TOO_MANY_CONTEXTS,
            "10000 images, at most 64 are allowed",
        ),
        ({"prompt": "a" * 2**20}, ErrorCode.PROMPT_TOO_LONG, "1048576 characters"),
        ({"guidance_scale": float("inf")}, ErrorCode.INVALID_SETTING, "guidance_scale"),
        ({"context_scale": float("inf")}, ErrorCode.INVALID_SETTING, "context_scale"),
        ({"width": -64}, ErrorCode.INVALID_SETTING, "width"),
        ({"scheduler": "magic"}, ErrorCode.UNKNOWN_SCHEDULER, "magic"),
        ({"num_inference_steps": 0}, ErrorCode.INVALID_SETTING, "num_inference_steps"),
        ({"num_inference_steps": "many"}, ErrorCode.INVALID_SETTING, "many"),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.1}, ErrorCode.INVALID_SETTING, "below"),
        ({"query": None}, ErrorCode.NO_QUERY, "query"),
        ({"context": []}, ErrorCode.NO_CONTEXT, "context"),
        ({"context": "[broken"}, ErrorCode.NO_CONTEXT, "JSON"),
        ({"id": "../../x"}, ErrorCode.INVALID_ID, "x"),
        ({"id": "a\0b"}, ErrorCode.INVALID_ID, "a"),
        ({"prompt": "x" * 10_001}, ErrorCode.PROMPT_TOO_LONG, "10001"),
    ],
)
def test_a_bad_row_becomes_a_row_with_its_code(change: dict[str, Any], code: ErrorCode, word: str) -> None:
    row = read(ROW | change)
    assert row["error_code"] == code
    assert word in row["error_message"]


def test_unknown_columns_pass_with_their_type_and_ours_are_renamed() -> None:
    passed = pa.schema([("status", pa.int16()), ("tags", pa.list_(pa.string()))])
    table = read_table([ROW | {"status": 5, "tags": ["x"]}], 0, RowRules.of_job(JOB), "/", passed)
    assert table.schema.names == [*READ.names, f"{PASSED}manifest_status", f"{PASSED}tags"]
    assert table.schema.field(f"{PASSED}manifest_status").type == pa.int16()
    job = JOB.model_copy(update={"columns": {"query": "photo"}})
    assert read({"photo": b"bytes", "context": "c.png"}, job)["query"] == {"bytes": b"bytes", "path": None}


def test_ids_that_stand_twice_are_named_whichever_bucket_they_fall_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("context_diffusion.inputs.unique_ids.BUFFERED", 4)  # so that buckets go to disk
    ids = [f"row {n}" for n in range(3000)] + ["row 17", "row 2999", "row 17"]
    with UniqueIds() as unique:
        for row_id in ids:
            unique.add(row_id)
        repeated = unique.duplicates()
    assert unique.count == 3003
    assert sorted(name_duplicates(repeated, ((name, "a place") for name in ids))) == ["row 17", "row 2999"]


def test_a_store_that_fails_while_a_parquet_file_is_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec.implementations.local as local

    uri = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({"id": ["a", "b"], "query": ["1", "2"]}), uri)
    opened = local.LocalFileSystem._open
    failures = iter(
        [ConnectionResetError("reset"), None, TimeoutError("late"), None, ConnectionResetError("reset")]
    )

    def failing(self: Any, path: str, **more: Any) -> Any:
        file = opened(self, path, **more)
        if (failure := next(failures, None)) is not None:
            monkeypatch.setattr(file, "read", lambda *_: (_ for _ in ()).throw(failure))
        return file

    monkeypatch.setattr(local.LocalFileSystem, "_open", failing)
    file = open_file(uri, STORAGE)
    assert [row["id"] for row in scan_parquet(file, STORAGE, ["id"])] == ["a", "b"]
    assert read_parquet(file, Shard(0, 0, 0, 2), STORAGE)["id"].to_pylist() == ["a", "b"]
    assert next(failures, "all met") == "all met"


@pytest.mark.parametrize(("sign", "name"), [(";", "`;`"), ("\t", "tabs")])
def test_a_csv_of_other_separators_is_told_so(tmp_path: Path, sign: str, name: str) -> None:
    (tmp_path / "m.csv").write_text(
        sign.join(("id", "query", "context")) + "\n" + sign.join(("1", "a.png", "b.png")) + "\n"
    )
    with pytest.raises(ManifestError, match=f"separated by {name}.*needs commas"):
        open_file(str(tmp_path / "m.csv"), Storage())
