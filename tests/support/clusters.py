"""A cluster of two raylets with token authentication, as one submits jobs to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from context_diffusion.cluster.supervisor import _members, end_session
from support.manifests import job_values, write_manifest
from support.ports import free_port, free_ports
from support.processes import COMMAND
from support.tiny import tiny_model

TOKEN = "a-token-of-this-test-and-no-other-0123456789"


@dataclass
class Cluster:
    """environment: of a client that may submit; nodes: ids, without the head's."""

    address: str
    dashboard: str
    nodes: list[str]
    process: subprocess.Popen[str]
    environment: dict[str, str]

    def add(self, **node: Any) -> str:
        """-> its id."""
        self.nodes.append(self._say(json.dumps(node | {"dashboard_agent_listen_port": free_port()})))
        return self.nodes[-1]

    def lose(self, node: str) -> None:
        """As a machine that is switched off."""
        self.nodes.remove(self._say(node))

    def drain(self, node: str, seconds: int) -> None:
        """What a spot machine's agent says when it is to be taken away."""
        asked = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        asked += ["--address", self.address, "--deadline-remaining-seconds", str(seconds)]
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray, "drain-node", *asked], env=self.environment, check=True, capture_output=True)

    def die(self) -> None:
        """All nodes at once."""
        for pid in _members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _say(self, line: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def start_cluster(python: str = sys.executable, nodes: int = 2) -> Iterator[Cluster]:
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_worker_niceness": "0",
        "NO_COLOR": "1",
    }
    environment |= {
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    }  # entrypoints say `python`
    command = [python, str(Path(__file__).with_name("cluster_process.py")), *map(str, free_ports(1 + nodes))]
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        line = next((text for text in process.stdout if text.startswith("{")), None)
        assert line, "the cluster did not start"
        yield Cluster(**json.loads(line), process=process, environment=environment)
    finally:
        assert process.stdin
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a busy machine: its end is no test's matter
            process.wait(timeout=60)
        end_session(process.pid)


def wait_for(happened: Callable[[], Any], seconds: float = 300) -> Any:
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.3)
    return found


def call(
    cluster: Cluster, *words: str, address: str | None = None, **more: str
) -> tuple[int, dict[str, Any], str]:
    """A command at the cluster's dashboard, or at that address: its code, last line and what it told."""
    command = [*COMMAND, *words, "--address", address or cluster.dashboard]
    done = subprocess.run(command, capture_output=True, text=True, env=cluster.environment | more)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def write_job(folder: Path, rows: int, changes: dict[int, dict[str, Any]] | None = None, **more: Any) -> str:
    settings = {"num_inference_steps": 2}
    tiny_model().save_pretrained(folder / "model")
    more = {"model": str(folder / "model"), "settings": settings, **more}
    values = job_values(write_manifest(folder / "in", rows, changes), folder / "out") | more
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "job.yaml")
