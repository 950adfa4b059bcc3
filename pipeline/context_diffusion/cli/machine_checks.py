"""What this machine is and has: packages, devices, memory, disk. Nothing is changed or downloaded."""

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
TOLD = (PACKAGE, "torch", "diffusers", "transformers", "ray", "pyarrow")
NOT_FOR_USERS = {"dev", "full"}  # extras of the project's own tests
LEAST_GIB = 1.0  # of memory and of disk: less than a small run takes
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


@dataclass(frozen=True)
class Check:
    """ok: False where something that is needed is broken. told: a line for people; values: the same for programs."""

    name: str
    ok: bool
    told: str
    values: dict[str, Any] = field(default_factory=dict)


def machine_checks() -> Iterator[Check]:
    yield packages()
    yield extras()
    yield devices()
    yield memory()
    yield disk()
    yield sockets()


def packages() -> Check:
    """Their versions, and those that the package needs otherwise."""
    found = {"python": platform.python_version()} | {name: version_of(name) for name in TOLD}
    needed = map(Requirement, importlib.metadata.requires(PACKAGE) or [])
    wrong = [lack for one in needed if one.marker is None or one.marker.evaluate() for lack in lacks(one)]
    told = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    return Check("packages", not wrong, told + "".join(f"; {line}" for line in wrong), {"versions": found, "wrong": wrong})


def lacks(needed: Requirement) -> list[str]:
    """What is wrong with a package that is needed."""
    version = version_of(needed.name)
    if version and needed.specifier.contains(version, prereleases=True):
        return []
    return [
        f"{needed.name}{needed.specifier} is needed, {version or 'none'} is here: pip install '{needed.name}{needed.specifier}'"
    ]


# What Linux takes as a socket's path, less the longest that Ray puts below its folder.
RAY_TMPDIR_BYTES = 107 - len("/ray/session_2026-11-29_09-27-51_369123_4194304/sockets/plasma_store")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def extras() -> Check:
    """Optional parts that are not installed: nothing is broken by them."""
    metadata = importlib.metadata.metadata(PACKAGE)
    names = [name for name in metadata.get_all("Provides-Extra") or [] if name not in NOT_FOR_USERS]
    needed = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    missing = {
        name: [one.name for one in needed if one.marker and one.marker.evaluate({"extra": name}) and lacks(one)] for name in names
    }
    missing = {name: lacking for name, lacking in missing.items() if lacking}
    hints = [f"{', '.join(lacking)}: pip install '{PACKAGE}[{name}]'" for name, lacking in missing.items()]
    return Check("extras", True, f"not here: {'; '.join(hints)}" if hints else "all are here", {"missing": missing})


def devices() -> Check:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except Exception as error:  # a broken installation: whatever its libraries lead to
        return Check("devices", False, f"torch cannot be imported: {type(error).__name__}: {error}", {"cpus": cpus})
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "gib": _gib(total), "free_gib": _gib(free)})
    told = "; ".join(f"{gpu['name']}, {gpu['free_gib']} of {gpu['gib']} GiB free" for gpu in gpus) or "no GPU"
    if not gpus and shutil.which("nvidia-smi"):
        told += f" that this torch ({torch.__version__}) can use, though nvidia-smi is here: install torch for CUDA"
    return Check("devices", True, f"{cpus} CPUs; {told}", {"cpus": cpus, "gpus": gpus})


def memory() -> Check:
    """The machine's, or the container's where that is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for path in LIMITS:
        limit = Path(path).read_text().strip() if Path(path).exists() else ""
        total = min(total, int(limit)) if limit.isdigit() else total
    free = min(free, total)
    told = f"{_gib(free)} of {_gib(total)} GiB free"
    hint = "" if (enough := free >= LEAST_GIB * 2**30) else f"; a run needs {LEAST_GIB:g} GiB at least"
    return Check("memory", enough, told + hint, {"gib": _gib(total), "free_gib": _gib(free)})


def disk() -> Check:
    """Where Ray keeps what does not fit into memory, where models are kept, and here."""
    places = {"temporary": tempfile.gettempdir(), "models": _nearest(model_cache()), "here": os.getcwd()}
    free = {name: _gib(shutil.disk_usage(path).free) for name, path in places.items()}
    told = ", ".join(f"{free[name]} GiB free in {path} ({name})" for name, path in places.items())
    few = [name for name, gib in free.items() if gib < LEAST_GIB]
    hint = f"; {LEAST_GIB:g} GiB at least are needed" if few else ""
    return Check("disk", not few, told + hint, {"free_gib": free})


def sockets() -> Check:
    """Ray makes its sockets below its temporary folder, and Linux takes no longer path for one than 107 bytes."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if length <= RAY_TMPDIR_BYTES:
        return Check("sockets", True, f"Ray's sockets fit below {folder}", {"folder": folder})
    reason = f"{folder}: its path has {length} bytes, and Ray's sockets leave {RAY_TMPDIR_BYTES}"
    return Check("sockets", False, f"{reason}; set RAY_TMPDIR to a short one, such as /tmp", {"folder": folder})


def model_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _nearest(path: Path) -> str:
    """The folder itself or the first above it that is there."""
    return str(next(one for one in (path, *path.parents) if one.exists()))


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
