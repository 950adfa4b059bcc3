"""Ray up, and down again. Its own noise goes to its session folder, which is named once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from context_diffusion.errors import ClusterError

OBJECT_STORE = 1 << 30  # bytes, of a Ray that is started here; a shard's pixels are some tens of MB


@contextmanager
def ray_session(num_cpus: int | None, address: str | None) -> Iterator[str]:
    """Connects to the cluster that `address` or RAY_ADDRESS names, else starts one here of so many CPUs
    (None: all). -> where Ray's logs are."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():  # a test's, or a notebook's
        yield _logs()
        return
    target = address or os.environ.get("RAY_ADDRESS")
    local = {} if target else {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        # "local": not the cluster that someone else happens to run on this machine
        ray.init(address=target or "local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"no Ray cluster at {target or 'this machine'}: {error}") from error
    try:
        yield _logs()
    finally:
        ray.shutdown()


def _logs() -> str:
    node = ray._private.worker.global_worker.node
    logs = os.path.join(node.get_session_dir_path(), "logs") if node else "the cluster's dashboard"
    driver = os.environ.get("CONTEXT_DIFFUSION_LOG")
    return f"{logs} and {driver}" if driver else logs
