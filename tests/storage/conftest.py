"""A real object store for all tests of this folder, and the environment that leads to it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from support.ceph import Gateway, missing
from support.processes import point_to, unavailable


@pytest.fixture(scope="session")
def gateway() -> Iterator[Gateway]:
    if lacking := missing():
        unavailable(
            f"no {', '.join(lacking)} here: `make packages` installs Debian's radosgw, ceph-mon and ceph-osd"
        )
    folder = Path(tempfile.mkdtemp(prefix="rgw-"))
    gateway = Gateway(folder)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()
        shutil.rmtree(folder)


@pytest.fixture
def bucket(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://...` of an empty bucket; the environment holds endpoint and keys, as on a cluster."""
    point_to(monkeypatch, gateway.endpoint)
    fs = s3fs.S3FileSystem()
    fs.call_s3("create_bucket", Bucket="tests")
    yield "s3://tests"
    point_to(monkeypatch, gateway.endpoint)
    fs = s3fs.S3FileSystem()
    fs.rm("tests", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
