"""What several tests share: an S3 server (moto) of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import hypothesis
import pytest

STARTED = time.monotonic()
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # no test asks the hub; without a network each try would wait half a minute
)
hypothesis.settings.register_profile(
    "here", deadline=None
)  # how long an example takes on a busy machine proves nothing
hypothesis.settings.load_profile("here")
# The order of `make test-full`: what no other test covers comes first, always. (pytest sorts overlapping
# paths its own way.)
FIRST = (
    "tests/storage/test_object_store.py",
    "tests/flow/test_cli.py",
    "tests/flow/test_disk.py",
    "tests/cluster/test_submit.py",
)
KILLS = "test_twenty_kills_lose_and_double_nothing"  # a minute or two each: each kill is a group of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In `make test-full` the groups behind FIRST begin at another one with each commit, so that the time
    left reaches all of them in turn."""
    if "TEST_SECONDS" not in os.environ:
        return
    groups = list(dict.fromkeys(map(_group, items)))
    others = [group for group in groups if group[0] == len(FIRST)]
    # Coprime to most numbers of groups, and as many as the time reaches: the next commit goes on where this
    # one ends.
    start = 7 * int(os.environ.get("TEST_TURN", "0")) % max(len(others), 1)
    places = {
        group: place
        for place, group in enumerate([*sorted(set(groups) - set(others)), *others[start:], *others[:start]])
    }
    items.sort(key=lambda item: places[_group(item)])


def _group(item: pytest.Item) -> tuple[int, str]:
    """What is left out together: its place in FIRST, and a file, or one of the kills."""
    path = item.path.relative_to(item.config.rootpath).as_posix()
    place = next((number for number, first in enumerate(FIRST) if path.startswith(first)), len(FIRST))
    return place, f"{path} {item.name}" if KILLS in item.name else path


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

    from support.processes import point_to

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    point_to(monkeypatch, _s3_server, "testing", "testing")
    fs = s3fs.S3FileSystem()
    fs.mkdir("tests")
    yield "s3://tests"
    fs.rm("tests", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
