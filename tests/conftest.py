"""What several tests share: an S3 server (moto) of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

STARTED = time.monotonic()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; without a network each try would wait half a minute
# The order of `make test-full`: what no other test covers comes first. (pytest sorts overlapping paths its own way.)
ORDER = ("store", "report", "flow", "cluster", "infra")
LAST = "test_twenty_kills_lose_and_double_nothing"  # a minute or two each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "TEST_SECONDS" in os.environ:
        places = {part: number for number, part in enumerate(ORDER)}
        items.sort(key=lambda item: (LAST in item.name, min(places.get(part, len(ORDER)) for part in item.path.parts)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make test-full` ends in its time: what would begin later is left out, and named by -rs."""
    seconds = float(os.environ.get("TEST_SECONDS", "inf"))
    if time.monotonic() - STARTED > seconds:
        pytest.skip(f"left out: {seconds:g} s are over")


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://bucket-...` of an empty bucket; the environment leads there, so no options are needed."""
    import s3fs

    from driving import point_to

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    point_to(monkeypatch, _s3_server, "testing", "testing")
    fs = s3fs.S3FileSystem()
    fs.mkdir("tests")
    yield "s3://tests"
    fs.rm("tests", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
