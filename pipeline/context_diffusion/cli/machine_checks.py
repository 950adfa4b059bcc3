"""Checks a machine's packages, devices, memory and disk. Changes and downloads nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PACKAGE = "context-diffusion"
LISTED_PACKAGES = (PACKAGE, "torch", "diffusers", "transformers", "ray", "pyarrow")
NOT_FOR_USERS = {"dev", "full"}  # extras of the project's own tests
MIN_GIB = 1.0  # of memory and of disk: less than a small run needs
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Linux's limit for the path of a socket, less the longest path that Ray adds to its folder.
RAY_TMPDIR_BYTES = 107 - len("/ray/session_2026-11-29_09-27-51_369123_4194304/sockets/plasma_store")


@dataclass(frozen=True)
class Check:
    """The result of a check. ok: False if something required is broken; message: for people; values: the same
    as fields."""

    name: str
    ok: bool
    message: str
    values: dict[str, Any] = field(default_factory=dict)


def machine_checks() -> Iterator[Check]:
    """Yield each check as it is done."""
    yield packages()
    yield extras()
    yield devices()
    yield memory()
    yield disk()
    yield sockets()


def packages() -> Check:
    """Check the versions of the required packages."""
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in LISTED_PACKAGES}
    required = [need for need in _requirements() if need.marker is None or need.marker.evaluate()]
    problems = [problem for need in required for problem in problems_of(need)]
    listed = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    return Check(
        "packages", not problems, "; ".join([listed, *problems]), {"versions": versions, "wrong": problems}
    )


def problems_of(requirement: Requirement) -> list[str]:
    """Return what is wrong with a required package: one line, or none."""
    version = version_of(requirement.name)
    if version and requirement.specifier.contains(version, prereleases=True):
        return []
    name = f"{requirement.name}{requirement.specifier}"
    state = f"{version} is installed" if version else "it is not installed"
    return [f"{name} is required, {state}: pip install '{name}'"]


def _requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]


def version_of(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> Check:
    """List the optional packages that are not installed. Their lack breaks nothing."""
    names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    packages_by_extra = {name: _missing_packages(name) for name in names if name not in NOT_FOR_USERS}
    missing = {name: packages for name, packages in packages_by_extra.items() if packages}
    hints = [f"{', '.join(packages)}: pip install '{PACKAGE}[{name}]'" for name, packages in missing.items()]
    message = f"not installed: {'; '.join(hints)}" if hints else "all are installed"
    return Check("extras", True, message, {"missing": missing})


def _missing_packages(extra: str) -> list[str]:
    """Return the packages of an extra that are missing or too old."""
    of_extra = [need for need in _requirements() if need.marker and need.marker.evaluate({"extra": extra})]
    return [need.name for need in of_extra if problems_of(need)]


def devices() -> Check:
    """Check that torch can be imported, and list CPUs and GPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except Exception as error:  # a broken installation may raise any error
        message = f"torch cannot be imported: {type(error).__name__}: {error}"
        return Check("devices", False, message, {"cpus": cpus})
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "gib": _gib(total), "free_gib": _gib(free)})
    listed = (
        "; ".join(f"{gpu['name']}, {gpu['free_gib']} of {gpu['gib']} GiB free" for gpu in gpus) or "no GPU"
    )
    if not gpus and shutil.which("nvidia-smi"):
        listed += (
            f" that this torch ({torch.__version__}) can use, but nvidia-smi exists: install torch for CUDA"
        )
    return Check("devices", True, f"{cpus} CPUs; {listed}", {"cpus": cpus, "gpus": gpus})


def memory() -> Check:
    """Check the memory of the machine, or of the container if that is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = page * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for path in CONTAINER_LIMITS:
        limit = Path(path).read_text().strip() if Path(path).exists() else ""
        total = min(total, int(limit)) if limit.isdigit() else total
    free = min(free, total)
    is_enough = free >= MIN_GIB * 2**30
    hint = "" if is_enough else f"; a run needs at least {MIN_GIB:g} GiB"
    message = f"{_gib(free)} of {_gib(total)} GiB free{hint}"
    return Check("memory", is_enough, message, {"gib": _gib(total), "free_gib": _gib(free)})


def disk() -> Check:
    """Check the free space for what Ray spills from memory, for models, and in the current folder."""
    folders = {"temporary": tempfile.gettempdir(), "models": _nearest(model_cache()), "here": os.getcwd()}
    free = {name: _gib(shutil.disk_usage(path).free) for name, path in folders.items()}
    listed = ", ".join(f"{free[name]} GiB free in {path} ({name})" for name, path in folders.items())
    is_enough = min(free.values()) >= MIN_GIB
    hint = "" if is_enough else f"; at least {MIN_GIB:g} GiB are required"
    return Check("disk", is_enough, listed + hint, {"free_gib": free})


def sockets() -> Check:
    """Check that the paths of Ray's sockets, in its temporary folder, stay within Linux's limit of 107
    bytes."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length <= RAY_TMPDIR_BYTES:
        return Check("sockets", True, f"{folder} is short enough for Ray's sockets", {"folder": folder})
    reason = (
        f"{folder}: the path has {length} bytes, at most {RAY_TMPDIR_BYTES} are allowed for Ray's sockets"
    )
    return Check(
        "sockets", False, f"{reason}; set RAY_TMPDIR to a short path, such as /tmp", {"folder": folder}
    )


def model_cache() -> Path:
    """Return the folder of the Hugging Face Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _nearest(path: Path) -> str:
    """Return the path, or its nearest parent that exists."""
    return str(next(folder for folder in (path, *path.parents) if folder.exists()))


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
