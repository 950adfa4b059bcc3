"""Connects to a Ray cluster or starts Ray on this machine, and shuts it down."""

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
from context_diffusion.core.event_log import WaitNotice
from context_diffusion.ray_jobs import token_hint

OBJECT_STORE = 1 << 30  # bytes, of a Ray that is started here; a shard's pixels are some tens of MB
OPEN_S = 20.0  # the limit for a cluster's port to open
ANSWER_S = 20.0  # the limit for an open port to answer as Ray does
PORTS = "its default port is 6379 (8265 is the dashboard's, for `submit`; 10001 is for ray://)"


@contextmanager
def ray_session(num_cpus: int | None, address: str | None) -> Iterator[str]:
    """Connect to the cluster of `address` or RAY_ADDRESS, or start Ray on this machine with `num_cpus` CPUs
    (None: all).

    Yields where Ray's logs are. Raises ClusterError."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():  # by a test or a notebook
        yield _logs()
        return
    target = address or os.environ.get("RAY_ADDRESS")
    if target and target not in ("auto", "local"):
        _check_reachable(target)
    _connect(target, num_cpus)
    try:
        yield _logs()
    finally:
        ray.shutdown()


def _connect(target: str | None, num_cpus: int | None) -> None:
    local = (
        {}
        if target
        else {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    )
    reason = f"the Ray cluster at {target} accepts this run" if target else "Ray starts on this machine"
    logs = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        with WaitNotice(lambda: reason):
            # "local": not a cluster of someone else on this machine
            ray.init(address=target or "local", **logs, **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"no Ray cluster at {target or 'this machine'}: {_explained(error)}") from error


def _check_reachable(target: str) -> None:
    """Raise ClusterError unless a Ray cluster listens at the address: `ray.init` would wait for minutes
    without a message, or end this process."""
    is_client = target.startswith("ray://")
    url = urlsplit(target if is_client else f"//{target}")
    try:
        host = url.hostname
        port = url.port or (10001 if is_client else 6379)
    except ValueError:
        host = None
    if host is None or (not is_client and "://" in target):
        forms = "expected HOST:PORT, ray://HOST:PORT or auto; `submit` takes http://"
        raise ClusterError(f"{target!r} is not the address of a Ray cluster: {forms}")
    with WaitNotice(lambda: f"the Ray cluster at {target} answers"):
        _wait_until_open(target, host, port)
        if not is_client:
            _wait_for_answer(target)


def _wait_until_open(target: str, host: str, port: int) -> None:
    """Wait until the port accepts a connection. Raises ClusterError after OPEN_S seconds."""
    deadline = time.monotonic() + OPEN_S
    while True:
        try:
            socket.create_connection((host, port), timeout=OPEN_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                hint = (
                    "check that the cluster is running and that this is its address (--address, RAY_ADDRESS)"
                )
                raise ClusterError(
                    f"no Ray cluster at {target}: {error} for {OPEN_S:.0f} s; {hint}"
                ) from error
            time.sleep(0.5)


def _wait_for_answer(target: str) -> None:
    """Connect to the cluster's head as `ray.init` does first, in a thread that can be abandoned. Raises
    ClusterError after ANSWER_S seconds."""
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
        message = f"the port at {target} is open, but does not answer as a Ray cluster's head does"
        raise ClusterError(f"{message}: {PORTS}; if the cluster requires a token, {token_hint()}")
    if outcome[0] is not None:
        raise ClusterError(f"no Ray cluster at {target}: {_explained(outcome[0])}") from outcome[0]


def _explained(error: Exception) -> str:
    """Return Ray's reason, with a hint where one is known."""
    text = one_line(str(error))
    if "auth" in text.lower() or "token" in text.lower():
        return f"{text}; {token_hint()}"
    if "AF_UNIX" in text:  # TMPDIR is too long
        return f"{text}; set RAY_TMPDIR to a short path, such as /tmp"
    return text


def _logs() -> str:
    """Return where the logs of Ray and of the driver are."""
    node = ray._private.worker.global_worker.node
    logs = os.path.join(node.get_session_dir_path(), "logs") if node else "the cluster's dashboard"
    driver = os.environ.get("CONTEXT_DIFFUSION_LOG")
    return f"{logs} and {driver}" if driver else logs
