"""A job for another machine: what it will not find there, the package along with it where it lacks it.

Knows Ray's Jobs API (ray_jobs.py), not Ray.
"""

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
    """wheel: a file with the package, where the cluster's image lacks it. Raises ConfigError where there is no such file."""
    found: dict[str, Any] = {"env_vars": env or {}}
    if wheel and not wheel.is_file():
        raise ConfigError(f"--wheel {wheel}: there is no such file; `pip wheel --no-deps .` makes one of a checkout")
    if wheel:
        data = wheel.read_bytes()
        # A wheel is a zip with the package in it. As .whl Ray would have pip install it, and torch with it.
        found["py_modules"] = [jobs.upload(f"{wheel.stem}-{hashlib.sha256(data).hexdigest()[:12]}.zip", data)]
    return found


def local_paths(values: dict[str, Any], address: str) -> list[str]:
    """What a cluster that is not this machine will not find."""
    if urlsplit(address).hostname in LOOPBACK:
        return []
    named = [values.get(key) for key in URIS + NAMES]
    flat = [one for value in named for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    return [one for one in flat if one.startswith("/")]


def submission_of(name: str, jobs: RayJobs | None) -> dict[str, Any]:
    """A submitted job: its status, message, exit code where it has ended, and OUTPUT. Raises JobError."""
    if "/" in name or jobs is None:
        hint = "" if "/" in name else ", and no cluster to ask for a submission of that name: give --address"
        raise JobError(f"{name}: no plan.json there; is it the `output:` of a job that was run?{hint}")
    job = jobs.get(name)
    if job is None or "output" not in (job.get("metadata") or {}):
        raise JobError(f"{name}: neither an OUTPUT folder nor a submission that {jobs.address} knows")
    ended = {key: job[key] for key in ("status", "message", "driver_exit_code")}
    return {"id": name, **ended, "output": job["metadata"]["output"]}
