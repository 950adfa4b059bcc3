"""Whole jobs on a real object store: manifest, pictures and output; read back by a client that shares nothing
with ours."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from support.ceph import SECRET, Gateway
from support.fault_proxy import FaultProxy, Rates
from support.manifests import job_values, write_manifest
from support.output_reader import read_output
from support.processes import drive, ended, point_to, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TYPICAL = Rates(reset=0.05, slow_down=0.05, truncated=0.10, lost=0.10)


def client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")


def upload(endpoint: str, folder: Path) -> None:
    s3 = client(endpoint)
    for path in folder.rglob("*"):
        s3.put_object(Bucket="tests", Key=f"in/{path.relative_to(folder)}", Body=path.read_bytes())


def download(endpoint: str, prefix: str, folder: Path) -> Path:
    s3 = client(endpoint)

    def fetch(key: str) -> None:
        path = folder / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get_object(Bucket="tests", Key=key)["Body"].read())

    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="tests", Prefix=f"{prefix}/")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fetch, [found["Key"] for page in pages for found in page.get("Contents", [])]))
    assert not s3.list_multipart_uploads(Bucket="tests").get("Uploads"), "an upload was left half done"
    return folder


@pytest.fixture
def proxy(gateway: Gateway, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(gateway.port) as proxy:
        point_to(monkeypatch, proxy.endpoint)
        yield proxy


def job_on(bucket: str, name: str, **more: Any) -> dict[str, Any]:
    patient = {"no_progress_timeout_s": 600}  # more than the storage's own deadline
    return job_values(f"{bucket}/in/manifest.parquet", f"{bucket}/{name}", cluster=patient, **more)


def pictures(folder: Path) -> dict[str, Any]:
    return {row["id"]: row["pixels"] for row in read_output(folder)}


def test_a_job_with_a_fifth_of_its_requests_broken_equals_one_without_faults(
    gateway: Gateway, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """1,000 images: resets, 503s, bodies cut off, writes whose answer is lost."""
    write_manifest(tmp_path / "in", 1000)
    upload(gateway.endpoint, tmp_path / "in")
    assert drive(job_on(bucket, "calm"))["exit"] == 0
    proxy.rates = TYPICAL
    told = drive(job_on(bucket, "stormy"))
    assert (told.get("exit"), told.get("ok")) == (0, 1000), told
    proxy.rates = Rates()
    assert all(proxy.done[fault] >= 20 for fault in ("reset", "slow_down", "truncated", "lost")), proxy.done
    calm, stormy = (
        pictures(download(gateway.endpoint, name, tmp_path / name)) for name in ("calm", "stormy")
    )
    assert len(calm) == 1000
    assert calm.keys() == stormy.keys()
    assert all(np.array_equal(calm[row], stormy[row]) for row in calm)


def half_done(gateway: Gateway, job: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """A run of 200 rows whose first part stands."""
    write_manifest(folder / "in", 200)
    upload(gateway.endpoint, folder / "in")
    process = start(job, "slow")
    while not client(gateway.endpoint).list_objects_v2(Bucket="tests", Prefix="out/data/").get("Contents"):
        assert process.poll() is None
        time.sleep(0.2)
    return process


def test_a_store_that_is_away_for_a_while_is_waited_for(
    gateway: Gateway, bucket: str, tmp_path: Path
) -> None:
    process = half_done(gateway, job_on(bucket, "out", rows_per_part=10), tmp_path)
    gateway.kill()
    time.sleep(60)
    gateway.resume()
    told = ended(process)
    assert (told.get("exit"), told.get("ok")) == (0, 200), told
    assert len(pictures(download(gateway.endpoint, "out", tmp_path / "out"))) == 200


@contextmanager
def lost(gateway: Gateway, fault: str) -> Iterator[None]:
    if fault == "keys revoked":
        gateway.user("suspend")
    else:
        gateway.kill()
    try:
        yield
    finally:
        if fault == "keys revoked":
            gateway.user("enable")
        else:
            gateway.resume()


@pytest.mark.parametrize("fault", ["away beyond the deadline", "keys revoked"])
def test_a_store_that_is_lost_in_the_middle_ends_the_job_with_75_and_it_goes_on_later(
    gateway: Gateway, bucket: str, tmp_path: Path, fault: str
) -> None:
    job = job_on(bucket, "out", rows_per_part=10)
    process = half_done(gateway, job, tmp_path)
    with lost(gateway, fault):
        told = ended(process)
    assert told["exit"] == 75, told
    assert bucket in told["error"]
    assert ("PermissionError" if fault == "keys revoked" else "Connect") in told["error"]
    told = drive(job)
    assert (told.get("exit"), told.get("ok")) == (0, 200), told
    assert told["skipped"] >= 10
    assert len(pictures(download(gateway.endpoint, "out", tmp_path / "out"))) == 200


def test_a_wrong_key_is_told_before_anything_starts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-this-one-at-all")
    told = drive(job_on(bucket, "out"))
    assert told["exit"] in (2, 75)
    assert bucket in told["error"]
    assert "not-this-one" not in str(told)


def test_no_secret_stands_in_anything_that_a_run_leaves(
    gateway: Gateway, bucket: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """The keys that are in use here, searched for in OUTPUT, in Ray's logs and in our own; with failed rows,
    and a run that cannot reach its store."""
    began = time.time()
    write_manifest(tmp_path / "in", 20, {3: {"query": "gone.png"}, 4: {"query": "s3://other/bucket.png"}})
    upload(gateway.endpoint, tmp_path / "in")
    assert drive(job_on(bucket, "out"))["exit"] == 3
    left = download(gateway.endpoint, "out", tmp_path / "out")
    files = [path for path in left.rglob("*") if path.is_file()]
    logs = [path for path in Path("/tmp").glob("context-diffusion-*.log") if path.stat().st_mtime >= began]
    logs += [
        path
        for path in Path("/tmp/ray").glob("session_2*/logs/**/*")
        if path.is_file() and path.stat().st_mtime >= began
    ]
    assert len(files) > 20
    assert len(logs) > 5
    found = [path for path in (*files, *logs) if SECRET.encode() in path.read_bytes()]
    assert found == []
