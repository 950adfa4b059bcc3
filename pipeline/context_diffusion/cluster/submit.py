"""Prepares a job for a cluster: ships the package, finds paths of this machine. Knows Ray's Jobs API
(ray_jobs.py), not Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from context_diffusion.core.errors import ConfigError, JobError
from context_diffusion.core.job_file import NAMES, URIS
from context_diffusion.ray_jobs import RayJobs

LOOPBACK = ("localhost", "127.0.0.1", "::1", None)


def runtime_env(jobs: RayJobs, wheel: Path | None, env: dict[str, str] | None) -> dict[str, Any]:
    """Return a job's runtime_env. wheel: a file with the package, for clusters whose image lacks it. Raises
    ConfigError if the file does not exist."""
    environment: dict[str, Any] = {"env_vars": env or {}}
    if wheel and not wheel.is_file():
        raise ConfigError(
            f"--wheel {wheel}: file not found; `pip wheel --no-deps .` builds one from a checkout"
        )
    if wheel:
        data = wheel.read_bytes()
        # A wheel is a zip with the package in it. A .whl would be installed by pip, with torch.
        name = f"{wheel.stem}-{hashlib.sha256(data).hexdigest()[:12]}.zip"
        environment["py_modules"] = [jobs.upload(name, data)]
    return environment


def local_paths(values: dict[str, Any], address: str) -> list[str]:
    """Return the paths of a job that other machines may lack; none if the cluster is this machine."""
    if urlsplit(address).hostname in LOOPBACK:
        return []
    strings = [text for key in URIS + NAMES for text in _strings(values.get(key))]
    return [path for path in strings if path.startswith("/")]


def _strings(value: Any) -> list[str]:
    """Return the strings of a value, of its items and of its parts."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in _strings(item)]


def submission_of(name: str, jobs: RayJobs | None) -> dict[str, Any]:
    """Return a submitted job: its id, status, message, OUTPUT and, if it has ended, exit code. Raises
    JobError.

    jobs: the cluster; None if none is named."""
    if "/" in name or jobs is None:
        hint = "" if "/" in name else "; if it is a SUBMISSION, name its cluster with --address"
        raise JobError(f"{name}: no plan.json there: expected the `output:` of a job that was run{hint}")
    job = jobs.get(name)
    if job is None or "output" not in (job.get("metadata") or {}):
        raise JobError(f"{name}: not found: expected an OUTPUT folder or a submission to {jobs.address}")
    state = {key: job[key] for key in ("status", "message", "driver_exit_code")}
    return {"id": name, **state, "output": job["metadata"]["output"]}
