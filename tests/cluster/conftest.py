"""A cluster of two raylets with token authentication, as one submits jobs to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.clusters import Cluster, start_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from start_cluster()
