"""A job as a Ray job: what is run on the cluster, under which id, and what there is of it already.

Knows Ray's Jobs API (ray_jobs.py), not Ray.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from context_diffusion.errors import ClusterError, ConfigError, OutputConflictError
from context_diffusion.ray_jobs import ACTIVE, RayJobs, RayJobsError
from context_diffusion.storage import normal
from context_diffusion.strict import StrictModel

ROOT = Path(__file__).parents[2]  # of a checkout
URIS, NAMES = ("manifest", "images", "output", "data", "allow"), ("model", "judge", "encoder")
LOOPBACK = ("localhost", "127.0.0.1", "::1", None)
STOP_MARGIN_S = 15  # that a run has to end after its grace


@dataclass(frozen=True)
class Submission:
    """attached: it ran already."""

    id: str
    attached: bool
    values: dict[str, Any]  # of the job, as the cluster sees it


def submit(
    job: StrictModel,
    jobs: RayJobs,
    flags: list[str] | None = None,
    wheel: Path | None = None,
    env: dict[str, str] | None = None,
    grace_s: float = 20.0,
) -> Submission:
    """flags: of `run`, as --retry-failed. wheel: the package, where the cluster's image lacks it.

    The id follows from job and OUTPUT: a job that runs is joined, one that has ended gets another attempt, which resumes.
    Raises OutputConflictError where another job is writing to OUTPUT; ClusterError.
    """
    values = absolute(job)
    output = f"{_slug(values['output'])}-{_digest(values['output'], 8)}-"
    prefix = f"{output}{_digest([values, flags], 6)}-"
    try:
        if running := _running(jobs, output, prefix, values["output"]):
            return Submission(running, True, values)
        attempts = [int(str(one["submission_id"]).rsplit("-", 1)[1]) for one in jobs.list(prefix)]
        name = f"{prefix}{max(attempts, default=0) + 1}"
        told = json.dumps(values, ensure_ascii=False)
        grace = ["--grace", f"{grace_s:g}"] if values["kind"] == "generate" else []
        command = shlex.join(["python", "-m", "context_diffusion", "run", "/dev/stdin", *(flags or []), *grace])
        entrypoint = f"printf %s {shlex.quote(told)} | {command}"
        new = jobs.submit(name, entrypoint, _runtime_env(jobs, wheel, env, grace_s), {"output": values["output"]})
    except RayJobsError as error:
        raise ClusterError(str(error)) from error
    return Submission(name, not new, values)


def _running(jobs: RayJobs, output: str, prefix: str, where: str) -> str | None:
    for one in jobs.list(output):
        if one["status"] in ACTIVE:
            name = str(one["submission_id"])
            if not name.startswith(prefix):
                raise OutputConflictError(
                    f"{where}: another job, {name}, is writing there; wait for it, or `context-diffusion stop {name}`"
                )
            return name
    return None


def _runtime_env(jobs: RayJobs, wheel: Path | None, env: dict[str, str] | None, grace_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_s) + STOP_MARGIN_S), **(env or {})}}
    if wheel:
        data = wheel.read_bytes()
        # A wheel is a zip with the package in it. As .whl Ray would have pip install it, and torch with it.
        found["py_modules"] = [jobs.upload(f"{wheel.stem}-{hashlib.sha256(data).hexdigest()[:12]}.zip", data)]
    return found


def wheel_of(wanted: str | None) -> Path | None:
    """A wheel file, or for `build` one of the checkout that this package runs from. Raises ConfigError."""
    if wanted != "build":
        if wanted and not Path(wanted).is_file():
            raise ConfigError(f"--wheel {wanted}: there is no such file; `build` makes one of a checkout")
        return Path(wanted) if wanted else None
    if not (ROOT / "pyproject.toml").exists():
        raise ConfigError(f"--wheel build: {ROOT} is no checkout of the project; name a wheel file")
    folder = tempfile.mkdtemp(prefix="context-diffusion-wheel-")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--wheel build: {done.stderr.strip()[-500:]}")
    return next(Path(folder).glob("*.whl"))


def absolute(job: StrictModel) -> dict[str, Any]:
    """The job's own values, for another working directory."""
    values = job.model_dump(mode="json", exclude_unset=True)

    def moved(value: Any, known: bool) -> Any:
        """known: it is a path or URI; else only where such a path exists, for it may be a name."""
        if isinstance(value, list):
            return [moved(one, known) for one in value]
        if isinstance(value, dict):
            return {key: moved(one, known) for key, one in value.items()}
        return normal(value) if isinstance(value, str) and (known or Path(value).exists()) else value

    return {key: moved(value, key in URIS) if key in URIS + NAMES else value for key, value in values.items()}


def local_paths(values: dict[str, Any], address: str) -> list[str]:
    """What a cluster that is not this machine will not find."""
    if urlsplit(address).hostname in LOOPBACK:
        return []
    named = [values.get(key) for key in URIS + NAMES]
    flat = [one for value in named for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    return [one for one in flat if one.startswith("/")]


def _slug(output: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", output.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:24] or "job"


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
