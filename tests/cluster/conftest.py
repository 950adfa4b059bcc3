"""A cluster of two raylets with token authentication, as one submits jobs to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOKEN = "a-token-of-this-test-and-no-other-0123456789"


@dataclass
class Cluster:
    """environment: of a client that may submit."""

    dashboard: str
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def lose_a_node(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("lose a node\n")
        self.process.stdin.flush()
        self.process.stdout.readline()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start_cluster(python: str = sys.executable) -> Iterator[Cluster]:
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0", "NO_COLOR": "1"}
    environment |= {"PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}  # entrypoints say `python`
    command = [python, str(Path(__file__).with_name("up.py")), *(str(free_port()) for _ in range(3))]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = next((text for text in process.stdout if text.startswith("{")), None)
        assert line, "the cluster did not start"
        yield Cluster(json.loads(line)["dashboard"], process, environment)
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from start_cluster()
