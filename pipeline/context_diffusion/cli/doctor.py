"""Checks the environment of a job: the machine (cli/machine_checks.py), storage, the cluster and the model's
weights. Starts no Ray, downloads nothing, and writes to storage only a probe in `output`, which it
deletes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from context_diffusion.cli.machine_checks import Check, machine_checks, model_cache
from context_diffusion.core.errors import ContextDiffusionError
from context_diffusion.core.job_base import writable_url
from context_diffusion.core.model_parts import LICENCES, PRESETS, parts_of
from context_diffusion.core.uris import normal
from context_diffusion.models.resolution.hub import obstacle_to, split
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.ray_jobs import RayJobs, RayJobsError, known_address, known_token
from context_diffusion.storage.filesystem import Storage

PATIENCE_S = 5.0  # the limit for each answer
BUNDLED_NOTE = "; it recolours and textures queries; to generate content use flux2-klein, sdxl or sd15"


def run_checks(urls: list[str], output: str | None, model: str, address: str | None) -> Iterator[Check]:
    """Yield each check as it is done. urls: must be readable; output: must be writable; address: of a cluster
    or of its dashboard."""
    yield from machine_checks()
    storage = Storage(deadline_s=PATIENCE_S)
    for url in urls:
        yield readable(url, storage)
    if output:
        yield writable(output, storage)
    yield cluster(address)
    yield weights(model)


def readable(url: str, storage: Storage) -> Check:
    """Check that a file or folder can be read."""
    uri = normal(url)
    try:
        if storage.is_folder(uri):
            return Check("storage", True, f"{url}: {len(storage.list(uri))} entries", {"url": url})
        storage.read_range(uri, 0, 1)
    except (OSError, ContextDiffusionError) as error:
        return Check("storage", False, f"cannot be read: {_message(error)}", {"url": url})
    return Check("storage", True, f"{url}: readable", {"url": url})


def writable(url: str, storage: Storage) -> Check:
    """Check that an OUTPUT can be written, and whether the store refuses to create an object twice."""
    try:
        creates_once = storage.try_writing(normal(writable_url(url)))
    except ValueError as error:
        return Check("output", False, f"{url}: {error}", {"url": url})
    except ContextDiffusionError as error:
        return Check("output", False, _message(error), {"url": url})
    note = ", but the store can create an object twice: do not run one job twice at the same time"
    message = f"{url}: writable{'' if creates_once else note}"
    return Check("output", True, message, {"url": url, "creates_once": creates_once})


def cluster(address: str | None) -> Check:
    """Check the Ray cluster of the address or the environment: its dashboard, or its port."""
    target = address or known_address() or os.environ.get("RAY_ADDRESS")
    if not target or target in ("auto", "local"):
        return Check(
            "cluster", True, "no cluster is set: a run starts Ray on this machine", {"address": None}
        )
    values = {"address": target}
    try:
        if target.startswith("http"):
            jobs = RayJobs(target, known_token(), PATIENCE_S, PATIENCE_S).list("")
            return Check("cluster", True, f"{target} answers, {len(jobs)} jobs", values)
        url = urlsplit(target if "://" in target else f"ray://{target}")
        socket.create_connection((url.hostname or "", url.port or 10001), PATIENCE_S).close()
    except (RayJobsError, OSError, ValueError) as error:
        return Check("cluster", False, f"{target} cannot be reached: {_message(error)}", values)
    return Check("cluster", True, f"{target} is open", values)


def weights(model: str) -> Check:
    """Check that a model's weights are in their folder or in the hub's cache, or can be downloaded."""
    if Path(model).exists() or (
        model not in PRESETS and ("/" not in model or model.startswith((".", "/", "~")))
    ):
        try:
            revision = find_model(model).revision
        except ContextDiffusionError as error:
            return Check("model", False, _message(error), {"model": model, "cached": False})
        note = BUNDLED_NOTE if model == "bundled" else ""
        message = f"{model}: found, revision {revision}{note}"
        return Check("model", True, message, {"model": model, "cached": True})
    parts = parts_of(model)
    licence = f"; licence {LICENCES[parts.base]}" if parts.base in LICENCES else ""
    missing = [part for part in parts.all if not is_cached(part, parts.revision)]
    if not missing:
        return Check(
            "model", True, f"{model}: all parts are cached{licence}", {"model": model, "cached": True}
        )
    obstacle = obstacle_to(split(missing[0])[0], PATIENCE_S)
    note = obstacle or "a run downloads them once per node"
    message = f"{model}: not cached yet: {', '.join(missing)}; {note}{licence}"
    return Check("model", not obstacle, message, {"model": model, "cached": False})


def is_cached(part: str, revision: dict[str, str]) -> bool:
    """Return whether the hub's cache has weights of a part, at its commit if that is known."""
    if Path(part).exists():
        return True
    repo, folder = split(part)
    snapshots = model_cache() / f"models--{repo.replace('/', '--')}" / "snapshots"
    files = folder if folder.endswith(".safetensors") else f"{folder}/**/*.safetensors"
    return any(snapshots.glob(f"{revision.get(repo, '*')}/{files}"))


def _message(error: Exception) -> str:
    if isinstance(error, ContextDiffusionError | RayJobsError):
        return str(error)
    return f"{type(error).__name__}: {error}"
