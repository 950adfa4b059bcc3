"""A head as one starts it by hand: `ray start --head`, whose PATH leads to no Python that has the package."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from context_diffusion.cluster.supervisor import end_session
from support.clusters import TOKEN, Cluster
from support.ports import free_ports

BARE = "/usr/bin:/bin"


@contextlib.contextmanager
def start_head(python: str = sys.executable, path: str = BARE, **more: str) -> Iterator[Cluster]:
    """Begins it and gives it away at once, before it answers. more: of its environment."""
    port, dashboard, agent, client = free_ports(4)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_worker_niceness": "0",
        "NO_COLOR": "1",
    }
    address = f"http://127.0.0.1:{dashboard}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # short: Ray's sockets lie in it
        command = [
            python,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--num-cpus",
            "2",
            "--temp-dir",
            folder,
        ]
        command += [
            "--port",
            str(port),
            "--dashboard-port",
            str(dashboard),
            "--dashboard-agent-listen-port",
            str(agent),
        ]
        command += [
            "--ray-client-server-port",
            str(client),
            "--object-store-memory",
            str(2**28),
            "--disable-usage-stats",
        ]
        process = subprocess.Popen(
            command,
            env=environment | {"PATH": path} | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            yield Cluster(f"127.0.0.1:{port}", address, [], process, environment)
        finally:
            process.terminate()  # `--block` takes its processes along
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            end_session(process.pid)


def bare_python(folder: Path) -> str:
    """A Python that has nothing installed, under the name `python`. -> its folder, for a PATH."""
    (folder / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    return str(folder)
