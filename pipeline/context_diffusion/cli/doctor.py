"""Is all here that a job needs? The machine (cli/machine_checks.py), storage, the cluster, the model's weights. Starts no Ray,
downloads nothing; of storage only a probe in `output` is written, and taken away."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from context_diffusion.cli.machine_checks import Check, machine_checks, model_cache
from context_diffusion.core.errors import ContextDiffusionError
from context_diffusion.core.job_base import writable_url
from context_diffusion.core.model_parts import PRESETS, parts_of
from context_diffusion.core.uris import normal
from context_diffusion.models.hub import obstacle_to, split
from context_diffusion.models.resolve import find_model
from context_diffusion.ray_jobs import RayJobs, RayJobsError, known_address, known_token
from context_diffusion.storage.filesystem import Storage

PATIENCE_S = 5.0  # for what is away


def examine(urls: list[str], output: str | None, model: str, address: str | None) -> Iterator[Check]:
    """One check after the other. urls: to be read; output: to be written; address: of a cluster's dashboard."""
    yield from machine_checks()
    storage = Storage(deadline_s=PATIENCE_S)
    for url in urls:
        yield readable(url, storage)
    if output:
        yield writable(output, storage)
    yield cluster(address)
    yield weights(model)


def readable(url: str, storage: Storage) -> Check:
    uri = normal(url)
    try:
        if storage.is_folder(uri):
            return Check("storage", True, f"{url}: {len(storage.list(uri))} entries", {"url": url})
        storage.read_range(uri, 0, 1)
    except (OSError, ContextDiffusionError) as error:
        return Check("storage", False, f"cannot be read: {_plain(error)}", {"url": url})
    return Check("storage", True, f"{url}: can be read", {"url": url})


def writable(url: str, storage: Storage) -> Check:
    try:
        once = storage.try_writing(normal(writable_url(url)))
    except ValueError as error:
        return Check("output", False, f"{url}: {error}", {"url": url})
    except ContextDiffusionError as error:
        return Check("output", False, _plain(error), {"url": url})
    how = "" if once else ", but the store lets an object be created twice: no two runs of one job at once"
    return Check("output", True, f"{url}: can be written{how}", {"url": url, "creates_once": once})


def cluster(address: str | None) -> Check:
    """The Ray that `--address` or the environment names: its dashboard, or its port."""
    named = address or known_address() or os.environ.get("RAY_ADDRESS")
    if not named or named in ("auto", "local"):
        return Check("cluster", True, "none is named, so a run starts Ray on this machine", {"address": None})
    try:
        if named.startswith("http"):
            jobs = RayJobs(named, known_token(), PATIENCE_S, PATIENCE_S).list("")
            return Check("cluster", True, f"{named} answers, {len(jobs)} jobs", {"address": named})
        place = urlsplit(named if "://" in named else f"ray://{named}")
        socket.create_connection((place.hostname or "", place.port or 10001), PATIENCE_S).close()
    except (RayJobsError, OSError, ValueError) as error:
        return Check("cluster", False, f"{named} cannot be reached: {_plain(error)}", {"address": named})
    return Check("cluster", True, f"{named} is open", {"address": named})


def weights(model: str) -> Check:
    """Those of a folder are there or not; those of the hub are kept here or will be downloaded."""
    if Path(model).exists() or (model not in PRESETS and ("/" not in model or model.startswith((".", "/", "~")))):
        try:
            found = find_model(model)
        except ContextDiffusionError as error:
            return Check("model", False, _plain(error), {"model": model, "cached": False})
        return Check("model", True, f"{model}: here, revision {found.revision}", {"model": model, "cached": True})
    parts = parts_of(model)
    missing = [part for part in parts.all if not kept(part, parts.revision)]
    if not missing:
        return Check("model", True, f"{model}: all of its parts are kept here", {"model": model, "cached": True})
    message, obstacle = f"{model}: not kept here yet: {', '.join(missing)}", obstacle_to(split(missing[0])[0], PATIENCE_S)
    message += f"; {obstacle}" if obstacle else "; a run downloads them once a node"
    return Check("model", not obstacle, message, {"model": model, "cached": False})


def kept(part: str, revision: dict[str, str]) -> bool:
    """Does the hub's cache hold weights of it, at its commit where that is known?"""
    if Path(part).exists():
        return True
    repo, folder = split(part)
    snapshots = model_cache() / f"models--{repo.replace('/', '--')}" / "snapshots"
    return any(snapshots.glob(f"{revision.get(repo, '*')}/{folder}/**/*.safetensors"))


def _plain(error: Exception) -> str:
    return str(error) if isinstance(error, ContextDiffusionError | RayJobsError) else f"{type(error).__name__}: {error}"
