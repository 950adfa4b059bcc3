"""Plans: shards put together are the manifest; OUTPUT belongs to one job, manifest and model."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.errors import ManifestError, OutputConflictError, StorageError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.generation.plan import open_plan, part_rows
from context_diffusion.generation.shards import read_shards
from context_diffusion.generation.stages.read_shard import ReadShard
from context_diffusion.inputs.rows import RowRules
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from support.job_files import load_job
from support.manifests import job_values, rows, write_manifest, write_pictures

STORAGE = Storage(deadline_s=1)


def job(manifest: Any, output: Path, **more: Any) -> GenerateJob:
    return GenerateJob.model_validate(job_values(manifest, output, **more))


def write_rows(folder: Path, table: list[dict[str, Any]], form: str, **options: Any) -> str:
    path = folder / f"manifest.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path, **options)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows({**row, "context": json.dumps(row["context"])} for row in table)
    return str(path)


def write_text(folder: Path, count: int, form: str) -> str:
    return write_rows(folder, rows(count, write_pictures(folder)), form)


def read_all(planned: GenerateJob, output: Output) -> list[dict[str, Any]]:
    plan = open_plan(planned, output, STORAGE)
    found = []
    for number, file in enumerate(plan.files):
        for shard in read_shards(output, number):
            [table] = ReadShard(RowRules.of_job(planned), file, shard, plan.passed, STORAGE)()
            assert table["shard"].unique().to_pylist() == [shard.number]
            found += table.to_pylist()
    assert len(found) == plan.rows
    return found


@given(st.integers(1, 10**7), st.integers(1, 5000), st.integers(1, 256))
def test_the_rule_of_small_manifests(count: int, asked: int, images: int) -> None:
    size = part_rows(count, asked)
    assert 1 <= size <= asked
    assert size == asked or size >= 4
    assert -(-count // size) <= max(8, -(-count // asked))
    assert part_rows(count, asked, images) == max(1, size // images), (
        "a matrix's shard holds as many pictures as another's"
    )


def test_a_manifest_may_be_files_of_several_formats_in_the_order_that_the_job_names_them(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    whole = rows(12, write_pictures(folder))
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]))
        writer.writeheader()
        writer.writerows({**row, "context": json.dumps(row["context"])} for row in whole[:5])
    pq.write_table(pa.Table.from_pylist([{**row, "likes": 7} for row in whole[5:9]]), folder / "b.parquet")
    (folder / "c.jsonl").write_text("".join(json.dumps({**row, "likes": "many"}) + "\n" for row in whole[9:]))
    (tmp_path / "job.yaml").write_text(f"kind: generate\nmanifest: none\noutput: {tmp_path}/out\n")
    names = ",".join(f"{folder}/{name}" for name in ("c.jsonl", "a.csv", "b.parquet"))
    planned = load_job(str(tmp_path / "job.yaml"), [f"manifest=[{names}]"])
    assert isinstance(planned, GenerateJob)
    found = read_all(planned, Output(str(tmp_path / "out"), STORAGE))
    assert [row["id"] for row in found] == [f"row-{number:03d}" for number in (*range(9, 12), *range(9))]
    by_id = {row["id"]: row for row in found}
    for row in whole:
        read = by_id[row["id"]]
        assert read["error_code"] is None
        assert [source["path"] for source in read["context"]] == [
            f"{folder}/{name}" for name in row["context"]
        ]
        assert json.loads(read["settings"])["num_inference_steps"] == row["num_inference_steps"]
        assert read["passed:author"] == row["author"]
    assert [by_id[f"row-{number:03d}"]["passed:likes"] for number in (0, 5, 9)] == [None, "7", "many"]


def test_every_format_gives_the_same_rows_in_order(tmp_path: Path) -> None:
    manifests = {
        "parquet": write_manifest(tmp_path / "in", 37),
        "jsonl": write_text(tmp_path / "in", 37, "jsonl"),
        "csv": write_text(tmp_path / "in", 37, "csv"),
    }
    read = {}
    for form, manifest in manifests.items():
        output = Output(str(tmp_path / form), STORAGE)
        read[form] = read_all(job(manifest, tmp_path / form, rows_per_part=5), output)
        assert [row["id"] for row in read[form]] == [f"row-{number:03d}" for number in range(37)]
        assert all(row["error_code"] is None for row in read[form])
    assert read["parquet"] == read["jsonl"] == read["csv"]
    assert read["csv"][3]["passed:author"] == "person 3"
    assert json.loads(read["csv"][3]["settings"])["scheduler"] == "euler"


def test_several_files_are_one_manifest(tmp_path: Path) -> None:
    for number in range(3):
        made = rows(5, write_pictures(tmp_path))
        lines = [json.dumps(row | {"id": f"{number}-{row['id']}"}) for row in made]
        (tmp_path / f"m{number}.jsonl").write_text("\n".join(lines))
    found = read_all(
        job(str(tmp_path / "m*.jsonl"), tmp_path / "out"), Output(str(tmp_path / "out"), STORAGE)
    )
    assert [row["id"] for row in found] == [f"{n}-row-{k:03d}" for n in range(3) for k in range(5)]


def test_duplicate_ids_and_missing_columns_are_refused_by_name(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"), STORAGE)
    manifest = write_manifest(tmp_path / "in", 12, {7: {"id": "row-003"}})
    with pytest.raises(ManifestError, match="'row-003'"):
        open_plan(job(manifest, tmp_path / "out"), output, STORAGE)
    with pytest.raises(ManifestError, match=r"column\(s\) picture are missing; there are id, query"):
        open_plan(job(manifest, tmp_path / "out", columns={"query": "picture"}), output, STORAGE)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_rows_without_ids_get_the_same_ones_again_and_equal_rows_are_refused(tmp_path: Path) -> None:
    names = write_pictures(tmp_path)
    lines = [
        json.dumps({"query": name, "context": [names[0]], "seed": number})
        for number, name in enumerate(names)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    planned = job(str(path), tmp_path / "out")
    ids = [row["id"] for row in read_all(planned, Output(str(tmp_path / "out"), STORAGE))]
    assert len(set(ids)) == len(names)
    assert ids == [row["id"] for row in read_all(planned, Output(str(tmp_path / "out"), STORAGE))]
    path.write_text("\n".join([*lines, lines[2]]))
    with pytest.raises(ManifestError, match="no id column"):
        open_plan(job(str(path), tmp_path / "other"), Output(str(tmp_path / "other"), STORAGE), STORAGE)


def test_an_empty_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="no rows"):
        open_plan(
            job(str(tmp_path / "m.jsonl"), tmp_path / "out"), Output(str(tmp_path / "out"), STORAGE), STORAGE
        )


def test_an_output_belongs_to_its_job_and_its_manifest(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "in", 12)
    output = Output(str(tmp_path / "out"), STORAGE)
    first = open_plan(job(manifest, tmp_path / "out"), output, STORAGE)
    again = open_plan(job(manifest, tmp_path / "out", cluster={"actors": 2}, max_failed=1), output, STORAGE)
    assert dataclasses.replace(again, job=first.job) == first
    with pytest.raises(OutputConflictError, match="seed: 0 planned, 5 now"):
        open_plan(job(manifest, tmp_path / "out", seed=5), output, STORAGE)
    record = json.loads(Path(output.plan).read_text())
    record["versions"]["torch"] = "1.0"
    Path(output.plan).write_text(json.dumps(record))
    with pytest.raises(OutputConflictError, match=r"torch 1\.0 then"):
        open_plan(job(manifest, tmp_path / "out"), output, STORAGE)
    assert open_plan(job(manifest, tmp_path / "out"), output, STORAGE, accept_change=True) == first
    write_manifest(tmp_path / "in", 13)
    with pytest.raises(OutputConflictError, match="changed since"):
        open_plan(job(manifest, tmp_path / "out"), output, STORAGE, accept_change=True)


def write_form(folder: Path, count: int, form: str) -> str:
    return write_manifest(folder, count) if form == "parquet" else write_text(folder, count, form)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(("before", "after"), [(37, 60), (90, 100), (100, 200)])
def test_a_manifest_that_grew_is_extended_and_old_shards_stay(
    tmp_path: Path, form: str, before: int, after: int
) -> None:
    manifest, output = write_form(tmp_path / "in", before, form), Output(str(tmp_path / "out"), STORAGE)
    planned = job(manifest, tmp_path / "out", rows_per_part=8)
    read_all(planned, output)
    old = list(read_shards(output, 0))
    output.storage.replace(output.success, b"")
    write_form(tmp_path / "in", after, form)
    with pytest.raises(OutputConflictError, match=r"changed since.*--extend"):
        open_plan(planned, output, STORAGE)
    assert open_plan(planned, output, STORAGE, extend=True).rows == after
    assert [row["id"] for row in read_all(planned, output)] == [
        f"row-{number:03d}" for number in range(after)
    ]
    new = list(read_shards(output, 0))
    assert new[: len(old)] == old
    assert [shard.number for shard in new] == list(range(len(new)))
    assert not output.storage.exists(output.success)


def test_new_files_after_the_old_are_taken_in(tmp_path: Path) -> None:
    names = write_pictures(tmp_path)

    def write(letter: str, count: int) -> str:
        lines = [json.dumps(row | {"id": f"{letter}-{row['id']}"}) for row in rows(count, names)]
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("\n".join(lines))
        return str(path)

    output = Output(str(tmp_path / "out"), STORAGE)
    globbed = job(str(tmp_path / "*.jsonl"), tmp_path / "out")
    write("b", 9)
    read_all(globbed, output)
    write("c", 7)
    with pytest.raises(OutputConflictError, match=r"1 file\(s\) were added to the manifest since .*c.jsonl"):
        open_plan(globbed, output, STORAGE)
    assert open_plan(globbed, output, STORAGE, extend=True).shards_of == [3, 2]
    assert [row["id"][0] for row in read_all(globbed, output)] == ["b"] * 9 + ["c"] * 7
    write("a", 5)
    with pytest.raises(OutputConflictError, match=r"b\.jsonl is no longer file 1 .* new files after the old"):
        open_plan(globbed, output, STORAGE, extend=True)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(OutputConflictError, match=r"c\.jsonl was removed"):
        open_plan(globbed, output, STORAGE)
    with pytest.raises(OutputConflictError, match=r"c\.jsonl is no longer file 2"):
        open_plan(globbed, output, STORAGE, extend=True)
    listed = job([str(tmp_path / "b.jsonl"), write("c", 7), write("d", 2)], tmp_path / "out")
    assert open_plan(listed, output, STORAGE, extend=True).rows == 18


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_a_manifest_whose_old_rows_changed_is_not_extended(tmp_path: Path, form: str) -> None:
    manifest, output = write_form(tmp_path / "in", 12, form), Output(str(tmp_path / "out"), STORAGE)
    planned = job(manifest, tmp_path / "out")
    before = open_plan(planned, output, STORAGE)
    write_form(tmp_path / "in", 11, form)
    with pytest.raises(OutputConflictError, match="had 12 rows and has 11"):
        open_plan(planned, output, STORAGE, extend=True)
    if form == "parquet":
        write_manifest(tmp_path / "in", 14, {3: {"id": "another"}})
    else:
        path = Path(write_form(tmp_path / "in", 14, form))
        path.write_text(path.read_text().replace("person 2", "person 9"))
    with pytest.raises(OutputConflictError, match="first 12 rows"):
        open_plan(planned, output, STORAGE, extend=True)
    write_form(tmp_path / "in", 12, form)
    assert open_plan(planned, output, STORAGE, extend=True) == before


def test_a_parquet_cut_into_other_row_groups_is_not_extended(tmp_path: Path) -> None:
    manifest, output = write_manifest(tmp_path / "in", 100), Output(str(tmp_path / "out"), STORAGE)
    planned = job(manifest, tmp_path / "out")
    open_plan(planned, output, STORAGE)
    write_manifest(tmp_path / "in", 120)
    pq.write_table(pq.read_table(manifest), manifest, row_group_size=50)
    with pytest.raises(OutputConflictError, match=r"row groups had \[90, 10\] rows and have \[50, 50, 20\]"):
        open_plan(planned, output, STORAGE, extend=True)


def test_the_plan_and_its_shards_lie_on_s3(s3: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 12)
    STORAGE.replace(f"{s3}/in/manifest.parquet", Path(manifest).read_bytes())
    output = Output(f"{s3}/out", STORAGE)
    found = read_all(job(f"{s3}/in/manifest.parquet", Path("unused"), rows_per_part=5).model_copy(), output)
    assert found[0]["query"]["path"] == f"{s3}/in/picture-0.png"
    assert len(found) == 12


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_corrected_cells_are_read_where_they_stand_now(tmp_path: Path, form: str) -> None:
    """Longer cells move all that follows, and a Parquet file may come back in other row groups."""
    table, output = rows(90, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    planned = job(write_rows(tmp_path, table, form, row_group_size=30), tmp_path / "out", rows_per_part=7)
    before, shards = read_all(planned, output), list(read_shards(output, 0))
    output.storage.replace(output.success, b"")
    table[40]["prompt"] = "a much longer prompt than the one that stood here"
    write_rows(tmp_path, table, form)
    with pytest.raises(OutputConflictError, match=r"changed since.*--retry-failed"):
        open_plan(planned, output, STORAGE)
    open_plan(planned, output, STORAGE, retry_failed=True)
    after = read_all(planned, output)
    assert [new["prompt"] for new, old in zip(after, before, strict=True) if new != old] == [
        table[40]["prompt"]
    ]
    assert [(s.number, s.rows) for s in read_shards(output, 0)] == [(s.number, s.rows) for s in shards]
    assert not output.storage.exists(output.success)
    if form == "parquet":
        write_rows(tmp_path, table, form, row_group_size=45)
        with pytest.raises(OutputConflictError, match="cut the planned rows 44 to 50"):
            open_plan(planned, output, STORAGE, retry_failed=True)


def finish(output: Output, table: list[dict[str, Any]]) -> None:
    """Parts of the rows' ids, as far as a plan looks at them."""
    for shard in read_shards(output, 0):
        ids = [row["id"] for row in table if row["shard"] == shard.number]
        path = Path(output.part(shard.number))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": ids, "status": ["ok"] * len(ids), "file_name": ids}), path)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_rows_that_moved_are_not_retried_in_places_of_others(tmp_path: Path, form: str) -> None:
    table, output = rows(12, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    planned = job(write_rows(tmp_path, table, form), tmp_path / "out")
    finish(output, read_all(planned, output))

    def retry(table: list[dict[str, Any]], **more: Any) -> None:
        write_rows(tmp_path, table, form)
        open_plan(
            job(str(tmp_path / f"manifest.{form}"), tmp_path / "out", **more),
            output,
            STORAGE,
            retry_failed=True,
        )

    with pytest.raises(OutputConflictError, match=r"row 5 of .* has the id 'row-005', and had 'row-004'"):
        retry([*table[:4], table[5], table[4], *table[6:]])
    with pytest.raises(OutputConflictError, match="had 12 rows and has 11"):
        retry(table[:-1])
    with pytest.raises(OutputConflictError, match="had 12 rows and has 13"):
        retry([*table, table[0] | {"id": "another"}])
    with pytest.raises(OutputConflictError, match="seed: 0 planned, 1 now"):
        retry(table, seed=1)
    with pytest.raises(
        OutputConflictError, match=r"limits\.max_contexts: \d+ planned, 3 now.*--retry-failed"
    ):
        open_plan(
            job(str(tmp_path / f"manifest.{form}"), tmp_path / "out", limits={"max_contexts": 3}),
            output,
            STORAGE,
        )
    renamed = [
        {("layout" if name == "query" else name): value for name, value in row.items()} for row in table
    ]
    retry(renamed, columns={"query": "layout"})
    assert json.loads(Path(output.plan).read_text())["job"]["columns"] == {"query": "layout"}


class Full(Storage):
    """No room is left when the offsets of the shards are written and plan.json is not."""

    def replace(self, uri: str, data: bytes) -> None:
        super().replace(uri, data)
        if "/plan/" in uri:
            raise StorageError("no space left")


def test_rows_without_ids_that_moved_are_not_retried(tmp_path: Path) -> None:
    """The most natural correction, and a wrong one: the bad row is taken out, another put at the end."""
    table, output = rows(12, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    table = [
        {"query": row["query"], "context": row["context"], "prompt": f"{n}"} for n, row in enumerate(table)
    ]
    planned = job(write_rows(tmp_path, table, "jsonl"), tmp_path / "out")
    finish(output, read_all(planned, output))
    write_rows(tmp_path, [*table[:3], *table[4:], table[3] | {"prompt": "new"}], "jsonl")
    with pytest.raises(OutputConflictError, match="have the content of other rows of the plan"):
        open_plan(planned, output, STORAGE, retry_failed=True)
    write_rows(tmp_path, [*table[:3], table[3] | {"prompt": "better"}, *table[4:]], "jsonl")
    open_plan(planned, output, STORAGE, retry_failed=True)
    write_rows(tmp_path, [*table[:3], table[3] | {"prompt": "better"}, *table[4:], table[3]], "jsonl")
    # The new row would have the id of the corrected one.
    with pytest.raises(OutputConflictError, match="have the content of other rows"):
        open_plan(planned, output, STORAGE, extend=True)


def test_pictures_of_what_rows_said_before_go(tmp_path: Path) -> None:
    """Of shards without a part, and of failed rows: nothing else would tell the new attempt that they are
    old."""
    table, output = rows(12, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    planned = job(write_rows(tmp_path, table, "jsonl"), tmp_path / "out", rows_per_part=4)
    read_all(planned, output)
    columns = {"id": [row["id"] for row in table[:4]], "status": ["ok", "failed", "ok", "ok"]}
    named = [f"images/part-00000/{n}.png" if n != 1 else None for n in range(4)]
    (tmp_path / "out" / "data").mkdir()
    pq.write_table(pa.table(columns | {"file_name": named}), output.part(0))
    for name in (
        *filter(None, named),
        "images/part-00000/1.png",
        "images/part-00001/4.png",
        "webdataset/part-00002.tar",
    ):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    table[5]["prompt"] = "another"
    write_rows(tmp_path, table, "jsonl")
    open_plan(planned, output, STORAGE, retry_failed=True)
    left = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*.*")
        if path.suffix in (".png", ".tar")
    }
    assert left == set(filter(None, named))


def test_a_correction_of_a_parquet_file_that_is_broken_off_is_done_by_the_next(tmp_path: Path) -> None:
    table, output = rows(120, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    planned = job(
        write_rows(tmp_path, table, "parquet", row_group_size=30), tmp_path / "out", rows_per_part=15
    )
    read_all(planned, output)
    write_rows(tmp_path, table, "parquet", row_group_size=45)
    full = Full(deadline_s=1)
    with pytest.raises(StorageError):
        open_plan(planned, Output(output.root, full), full, retry_failed=True)
    with pytest.raises(OutputConflictError, match="was interrupted"):
        open_plan(planned, output, STORAGE, extend=True)
    open_plan(planned, output, STORAGE, retry_failed=True)
    assert [row["id"] for row in read_all(planned, output)] == [row["id"] for row in table]


def test_a_correction_that_is_broken_off_is_done_by_the_next(tmp_path: Path) -> None:
    """Between the offsets and plan.json: until then the plan fits neither version, or its bytes would be
    another row's."""
    table, output = rows(12, write_pictures(tmp_path)), Output(str(tmp_path / "out"), STORAGE)
    planned = job(write_rows(tmp_path, table, "jsonl"), tmp_path / "out")
    read_all(planned, output)
    original = Path(planned.manifests[0]).stat().st_mtime_ns
    table[0]["prompt"] = "another, which is longer"
    write_rows(tmp_path, table, "jsonl")
    full = Full(deadline_s=1)
    with pytest.raises(StorageError):
        open_plan(planned, Output(output.root, full), full, retry_failed=True)
    table = rows(12, write_pictures(tmp_path))
    write_rows(tmp_path, table, "jsonl")
    os.utime(planned.manifests[0], ns=(original, original))
    with pytest.raises(OutputConflictError, match="changed since"):
        open_plan(planned, output, STORAGE)
    open_plan(planned, output, STORAGE, retry_failed=True)
    assert [row["prompt"] for row in read_all(planned, output)] == [row["prompt"] for row in table]


def test_a_plan_of_an_older_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "in", 3)
    output = Output(str(tmp_path / "out"), STORAGE)
    open_plan(job(manifest, tmp_path / "out"), output, STORAGE)
    record = output.read_json(output.plan)
    del record["allow"]
    record["job"]["cluster"]["price_per_hour"] = None
    Path(output.plan).write_text(json.dumps(record))
    with pytest.raises(OutputConflictError, match="planned by an older version"):
        open_plan(job(manifest, tmp_path / "out"), output, STORAGE)
