"""The flow on a real Ray: complete on any cluster, exactly once whatever dies, bad rows as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from support.manifests import job_values, write_manifest
from support.output_reader import plan_rows, read_output
from support.processes import drive, end, start, wait_for_parts

pytestmark = pytest.mark.ray


def check_whole(folder: Path, rows: int) -> list[dict[str, Any]]:
    found = read_output(folder)
    assert plan_rows(folder) == rows
    assert sorted(row["id"] for row in found) == [f"row-{number:03d}" for number in range(rows)]
    assert (folder / "_SUCCESS").exists()
    planned = pq.read_table(folder / "plan" / "00000.parquet").to_pylist()
    parts = {f"part-{shard['number']:05d}.parquet": shard["rows"] for shard in planned}
    assert {path.name: pq.read_metadata(path).num_rows for path in folder.glob("data/*")} == parts, (
        "a part is a shard"
    )
    return found


@pytest.mark.parametrize(
    "cluster", [pytest.param({"num_cpus": 1}, marks=pytest.mark.slow), {"num_cpus": 2, "actors": 2}], ids=str
)
def test_200_rows_complete_on_any_cluster(tmp_path: Path, cluster: dict[str, Any]) -> None:
    job = job_values(write_manifest(tmp_path / "in", 200), tmp_path / "out", cluster=cluster)
    summary = drive(job)
    assert (summary["exit"], summary["rows"], summary["ok"], summary["images"]) == (0, 200, 200, 200)
    rows = check_whole(tmp_path / "out", 200)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows), (
        "parts hold their rows in input order"
    )
    assert {row["author"] for row in rows} == {f"person {number}" for number in range(4)}
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    again = drive(job)
    assert (again["exit"], again["skipped"]) == (0, 200)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before, (
        "a rerun touched what was done"
    )


def test_engines_share_the_gpus_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logical one: Ray Data has rules of its own for actors that hold GPUs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    node = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 2**28}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # its workers import fakes.py
        cluster = Cluster(initialize_head=True, head_node_args=node)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        for number, shares in enumerate(({}, {"gpus_per_actor": 0.5})):
            out = tmp_path / f"out-{number}"
            assert drive(job_values(write_manifest(tmp_path / "in", 24), out, cluster=shares))["exit"] == 0
            check_whole(out, 24)
    finally:
        cluster.shutdown()


def test_a_cluster_too_small_is_told_at_the_start(tmp_path: Path) -> None:
    job = job_values(
        write_manifest(tmp_path / "in", 8), tmp_path / "out", cluster={"num_cpus": 1, "actors": 20}
    )
    summary = drive(job)
    assert summary["exit"] == 75
    assert "20 engine(s)" in summary["error"]


@pytest.mark.usefixtures("shared_ray")
def test_an_engine_that_cannot_start_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    summary = drive(job_values(write_manifest(tmp_path / "in", 8), tmp_path / "out"), "cannot_start")
    assert summary["exit"] != 0
    assert "the device of this test does not exist" in summary["error"]


@pytest.mark.usefixtures("shared_ray")
def test_a_chunk_that_the_engine_s_device_lacks_ends_the_job_as_a_wrong_job(tmp_path: Path) -> None:
    """It has one on a GPU, and the driver doesn't know the engine's device."""
    values = job_values(write_manifest(tmp_path / "in", 8), tmp_path / "out", cluster={"chunk": 32})
    summary = drive(values, "native")
    assert summary["exit"] == 2
    assert summary["error"] == "chunk 32: this model on this device has chunks of 1, 2, 3, 4 lanes"


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_touches_nothing_that_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = job_values(write_manifest(tmp_path / "in", 200), out, rows_per_part=10)
    process = start(job, "slow")
    wait_for_parts(out, 4)
    end(process)
    done = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("data/*.parquet")}
    assert 4 <= len(done) < 20
    summary = drive(job)
    assert (summary["exit"], summary["rows"]) == (0, 200)
    assert summary["skipped"] == 10 * len(done)
    check_whole(out, 200)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done} == done


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_killed_engine_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = drive(job_values(write_manifest(tmp_path / "in", 130), out), "dies_once")
    assert Path(f"{out}.died").exists(), "the engine was to die once"
    assert (summary["exit"], summary["ok"]) == (0, 130)
    check_whole(out, 130)


@pytest.mark.usefixtures("shared_ray")
def test_a_row_that_kills_its_engine_fails_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = drive(job_values(write_manifest(tmp_path / "in", 60), out), "poisoned")
    assert (summary["exit"], summary["ok"], summary["failed"]) == (3, 59, 1)
    [failed] = [row for row in check_whole(out, 60) if row["status"] == "failed"]
    assert (failed["id"], failed["error_code"]) == ("row-033", "engine_crash")


BAD: dict[int, tuple[dict[str, Any], str, str]] = {
    1: ({"query": "nowhere.png"}, "missing_file", "nowhere.png"),
    2: ({"query": "text.png"}, "not_an_image", "text.png"),
    3: ({"query": "cut.png"}, "truncated_image", "cut.png"),
    4: ({"query": "huge.png"}, "too_many_pixels", "huge.png"),
    5: ({"context": []}, "no_context", "context"),
    6: ({"scheduler": "magic"}, "unknown_scheduler", "magic"),
    7: ({"num_inference_steps": 0}, "invalid_setting", "num_inference_steps"),
    8: ({"id": "../../x"}, "invalid_id", "../../x"),
    9: ({"query": "/etc/hostname"}, "forbidden_uri", "/etc/hostname"),
    10: ({"query": None}, "no_query", "query"),
}


@pytest.mark.usefixtures("shared_ray")
def test_bad_rows_become_rows_and_the_others_are_made(tmp_path: Path) -> None:
    from PIL import Image

    manifest = write_manifest(tmp_path / "in", 16, {number: change for number, (change, _, _) in BAD.items()})
    (tmp_path / "in" / "text.png").write_text("no picture")
    good = (tmp_path / "in" / "picture-0.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(good[: len(good) // 2])
    Image.new("L", (400, 400)).save(tmp_path / "in" / "huge.png")
    job = job_values(manifest, tmp_path / "out", limits={"max_pixels": 100_000})
    summary = drive(job)
    assert (summary["exit"], summary["ok"], summary["failed"]) == (3, 6, 10)
    found = {row["id"]: row for row in read_output(tmp_path / "out")}
    for number, (change, code, word) in BAD.items():
        row = found[change.get("id", f"row-{number:03d}")]
        assert (row["status"], row["error_code"]) == ("failed", code), row["error_message"]
        assert word in row["error_message"]
    limited = drive(job | {"output": str(tmp_path / "limited"), "max_failed": 5})
    assert limited["exit"] == 4
    assert "max_failed allows 5" in limited["error"]
    assert not (tmp_path / "limited" / "_SUCCESS").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_the_bundled_model_makes_the_same_pictures_however_the_job_is_cut(tmp_path: Path) -> None:
    """The real engine: other shards, two actors, a manifest turned round: equal pixels, row by row."""
    manifest = write_manifest(tmp_path / "in", 8)
    turned = tmp_path / "in" / "turned.parquet"
    table = pq.read_table(manifest)
    pq.write_table(table.take(list(range(7, -1, -1))), turned)
    jobs = {
        "whole": job_values(manifest, tmp_path / "whole"),
        "small": job_values(manifest, tmp_path / "small", rows_per_part=1, cluster={"actors": 2}),
        "turned": job_values(str(turned), tmp_path / "turned", rows_per_part=3),
    }
    pictures: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        assert drive(job, "native")["exit"] == 0
        pictures[name] = {row["id"]: row["pixels"] for row in read_output(tmp_path / name)}
    for name in ("small", "turned"):
        assert pictures[name].keys() == pictures["whole"].keys()
        for row, pixels in pictures["whole"].items():
            assert np.array_equal(pixels, pictures[name][row]), (name, row)
