"""Ray up, and down again. Its own noise goes to its session folder, which is named once."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray

from context_diffusion.core.errors import ClusterError, one_line
from context_diffusion.core.event_log import Waiting
from context_diffusion.ray_jobs import token_hint

OBJECT_STORE = 1 << 30  # bytes, of a Ray that is started here; a shard's pixels are some tens of MB
OPEN_S, ANSWER_S = 20.0, 20.0  # until a cluster's port is open, and until what listens there answers as Ray does
PORTS = "its port is 6379 where nothing else was said (8265 is the dashboard's, for `submit`; 10001 is for ray://)"


@contextmanager
def ray_session(num_cpus: int | None, address: str | None) -> Iterator[str]:
    """Connect to the cluster that `address` or RAY_ADDRESS names, else start one here of so many CPUs (None: all). Yields
    where Ray's logs are. Raises ClusterError."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():  # a test's, or a notebook's
        yield _logs()
        return
    target = address or os.environ.get("RAY_ADDRESS")
    if target and target not in ("auto", "local"):
        _check_reachable(target)
    local = {} if target else {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        # "local": not the cluster that someone else happens to run on this machine
        with Waiting(lambda: f"the Ray cluster at {target} lets this run in" if target else "Ray starts on this machine"):
            ray.init(address=target or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"no Ray cluster at {target or 'this machine'}: {_explained(error)}") from error
    try:
        yield _logs()
    finally:
        ray.shutdown()


def _check_reachable(target: str) -> None:
    """Raise ClusterError where nothing listens at the address, or not a Ray cluster: `ray.init` would wait for minutes and
    say nothing, or end this process."""
    client = target.startswith("ray://")
    place = urlsplit(target if client else f"//{target}")
    try:
        host, port = place.hostname, place.port or (10001 if client else 6379)
    except ValueError:
        host = None
    if host is None or (not client and "://" in target):
        raise ClusterError(
            f"{target!r} is no address of a Ray cluster: HOST:PORT, ray://HOST:PORT or auto; `submit` takes http://"
        )
    with Waiting(lambda: f"the Ray cluster at {target} answers"):
        _wait_until_open(target, host, port)
        if not client:
            _wait_for_answer(target)


def _wait_until_open(target: str, host: str, port: int) -> None:
    until = time.monotonic() + OPEN_S
    while True:
        try:
            socket.create_connection((host, port), timeout=OPEN_S).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                hint = "is the cluster running, and is this its address (--address, RAY_ADDRESS)?"
                raise ClusterError(f"no Ray cluster at {target}: {error} for {OPEN_S:.0f} s; {hint}") from error
            time.sleep(0.5)


def _wait_for_answer(target: str) -> None:
    """The first thing that `ray.init` does, in a thread that can be left behind."""
    outcome: list[Exception | None] = []

    def connect() -> None:
        try:
            ray._raylet.GcsClient(address=target)
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not outcome:
        wrong = f"{target} is open, but does not answer as a Ray cluster's head does"
        raise ClusterError(f"{wrong}: {PORTS}, and a cluster with a token: {token_hint()}")
    if outcome[0] is not None:
        raise ClusterError(f"no Ray cluster at {target}: {_explained(outcome[0])}") from outcome[0]


def _explained(error: Exception) -> str:
    """Ray's reason, and what to do where it is known."""
    text = one_line(str(error))
    if "auth" in text.lower() or "token" in text.lower():
        return f"{text}; {token_hint()}"
    if "AF_UNIX" in text:  # a long TMPDIR
        return f"{text}; set RAY_TMPDIR to a short path, such as /tmp"
    return text


def _logs() -> str:
    node = ray._private.worker.global_worker.node
    logs = os.path.join(node.get_session_dir_path(), "logs") if node else "the cluster's dashboard"
    driver = os.environ.get("CONTEXT_DIFFUSION_LOG")
    return f"{logs} and {driver}" if driver else logs
