"""What a manifest may be, through the whole flow: an object store, inline bytes, renamed columns, fits, a
second try."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support.manifests import job_values, rows, write_manifest, write_pictures
from support.output_reader import read_output
from support.processes import drive
from support.tiny import picture

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_jsonl_manifest_in_an_object_store_with_its_own_column_names(tmp_path: Path, s3: str) -> None:
    import s3fs

    store = s3fs.S3FileSystem()
    names = write_pictures(tmp_path / "in")
    for name in names:
        store.put(str(tmp_path / "in" / name), f"{s3}/in/pictures/{name}")
    lines = []
    for row in rows(20, [f"pictures/{name}" for name in names]):
        row["key"], row["layout"], row["styles"] = row.pop("id"), row.pop("query"), row.pop("context")
        lines.append(json.dumps(row | {"note": "é" if row["key"] == "row-003" else None}))
    store.pipe(f"{s3}/in/rows.jsonl", "\n".join(lines).encode())
    columns = {"id": "key", "query": "layout", "context": "styles"}
    job = job_values(f"{s3}/in/*.jsonl", f"{s3}/out", columns=columns, rows_per_part=8)
    first, again = drive(job), drive(job)
    assert (first["exit"], first["rows"], first["skipped"]) == (0, 20, 0)
    assert (again["exit"], again["rows"], again["skipped"]) == (0, 20, 20)
    store.get(f"{s3}/out", str(tmp_path / "out"), recursive=True)
    found = read_output(tmp_path / "out")
    assert [row["id"] for row in found] == [f"row-{number:03d}" for number in range(20)]
    assert [row["note"] for row in found if row["note"]] == ["é"]
    assert {row["author"] for row in found} == {f"person {number}" for number in range(4)}


FITS = [
    pytest.param("keep", (96, 176), marks=pytest.mark.slow),
    ("pad", (128, 128)),
]  # of the others test_images.py


@pytest.mark.parametrize(("fit", "size"), FITS)
@pytest.mark.usefixtures("shared_ray")
def test_pictures_as_bytes_in_the_manifest_meet_the_size_as_the_job_says(
    tmp_path: Path, fit: str, size: tuple[int, int]
) -> None:
    Image.fromarray(picture(1, 64, 128)).save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    query, context = {"bytes": data, "path": None}, [{"bytes": data, "path": "wide.png"}]
    made = [{"query": query, "context": context, "prompt": str(number)} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    assert drive(job_values(str(tmp_path / "rows.parquet"), tmp_path / "out", fit=fit))["exit"] == 0
    found = read_output(tmp_path / "out")
    assert len({row["id"] for row in found}) == 3, "ids are derived from the rows"
    assert {(row["height"], row["width"]) for row in found} == {size}


@pytest.mark.usefixtures("shared_ray")
def test_what_failed_is_made_by_retry_failed_and_nothing_else_is(tmp_path: Path) -> None:
    changes = {3: {"query": "late.png"}, 4: {"scheduler": "magic"}}
    job = job_values(write_manifest(tmp_path / "in", 12, changes), tmp_path / "out", rows_per_part=4)
    assert drive(job)["failed"] == 2
    before = {row["id"]: row for row in read_output(tmp_path / "out")}
    third = (tmp_path / "out" / "data" / "part-00002.parquet").stat().st_mtime_ns
    Image.fromarray(picture(9)).save(tmp_path / "in" / "late.png")
    assert drive(job)["failed"] == 2, "a finished OUTPUT is left as it is"
    summary = drive(job, retry_failed=True)
    assert (summary["exit"], summary["ok"], summary["failed"]) == (3, 11, 1)
    after = {row["id"]: row for row in read_output(tmp_path / "out")}
    assert after["row-003"]["status"] == "ok"
    assert after["row-004"]["error_code"] == "unknown_scheduler"
    assert all(after[row]["sha256"] == old["sha256"] for row, old in before.items() if old["status"] == "ok")
    assert (tmp_path / "out" / "data" / "part-00002.parquet").stat().st_mtime_ns == third


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_several_images_a_row_and_a_job_that_goes_on_with_a_higher_limit(tmp_path: Path) -> None:
    job = job_values(
        write_manifest(tmp_path / "in", 12, {n: {"query": "no.png"} for n in (0, 1, 2)}),
        tmp_path / "out",
        settings={"num_images": 3},
        rows_per_part=4,
    )
    assert drive(job | {"max_failed": 2})["exit"] == 4
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    summary = drive(job | {"max_failed": "25%"})
    assert (summary["exit"], summary["rows"], summary["images"]) == (3, 12, 27)
    found = read_output(tmp_path / "out")
    assert sorted((row["id"], row["index"]) for row in found if row["status"] == "ok") == [
        (f"row-{number:03d}", index) for number in range(3, 12) for index in range(3)
    ]
    seeds = [row["seed"] for row in found if row["id"] == "row-005"]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]


@pytest.mark.usefixtures("shared_ray")
def test_folders_that_datasets_wrote_are_manifests(tmp_path: Path) -> None:
    """Parquet shards with pictures in them, and an ImageFolder with its metadata."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    pictures = [Image.open(tmp_path / "in" / name).copy() for name in write_pictures(tmp_path / "in")]
    features = Features(
        {"id": Value("string"), "image": Picture(), "context": List(Picture()), "prompt": Value("string")}
    )
    made = [
        {"id": f"{n}", "image": pictures[n], "context": pictures[n + 1 : n + 3], "prompt": "ocean"}
        for n in range(4)
    ]
    written = Dataset.from_list(made, features=features)
    for shard in range(2):
        written.shard(2, shard).to_parquet(tmp_path / "hub" / "data" / f"train-0000{shard}-of-00002.parquet")
    lines = [
        {"file_name": f"picture-{n}.png", "context": [f"picture-{n + 1}.png"], "text": "forest"}
        for n in range(4)
    ]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for manifest, columns, words in (
        (tmp_path / "hub", {"query": "image"}, "ocean"),
        (tmp_path / "in", {"query": "file_name", "prompt": "text"}, "forest"),
    ):
        out = tmp_path / f"out-{words}"
        assert drive(job_values(str(manifest), out, columns=columns))["exit"] == 0
        assert [row["prompt"] for row in read_output(out)] == [words] * 4
