"""pyproject.toml's lower bounds hold: each can be had for every Python that is promised, and the tests pass
on them.

The upper end is what `make install` takes, so what all other tests run on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from support.processes import unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("lora", "train", "gcs", "azure", "view")
FIRST, LAST = map(int, re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
PYTHONS = [f"3.{minor}" for minor in range(FIRST, LAST)]
LENT = re.compile("torch$|ray$|triton$|nvidia|cuda")
QUICK = [
    "core/test_job_file.py",
    "inputs/test_manifest_files.py",
    "generation/test_plan.py",
    "storage/test_filesystem.py",
    "generation/test_write_shard.py",
    "inputs/test_decode.py",
    "outputs/test_output_folder.py",
    "generation/test_fault_ledger.py",
    "inputs/test_image_sources.py",
    "outputs/test_compact.py",
    "api/test_image_tensors.py",
    "project/test_rooms.py",
    "models/native/test_native_model.py",
]


def resolved(python: str, resolution: str) -> dict[str, str]:
    """Package: version, from wheels alone."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--only-binary",
        ":all:",
        "--python-version",
        python,
    ]
    command += ["--resolution", resolution, "--no-annotate", "--no-header", "pyproject.toml"]
    for extra in EXTRAS:
        command += ["--extra", extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if re.search(r"dns|connect|timed out", done.stderr):
        unavailable(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", done.stdout, flags=re.M))


def bounds() -> dict[str, str]:
    """Package: its lower bound."""
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]),
    ]
    return dict(re.match(r"([a-z0-9-]+)(?:\[[a-z,]+\])?>=([0-9.]+)", line).groups() for line in wanted)  # type: ignore[union-attr]


@pytest.mark.parametrize("python", PYTHONS)
def test_there_are_wheels_of_the_oldest_and_of_the_newest_for_each_python(python: str) -> None:
    for resolution in ("lowest-direct", "highest"):
        assert bounds().keys() <= resolved(python, resolution).keys()


def test_no_bound_is_lower_than_what_can_ever_be_installed() -> None:
    found = resolved(PYTHONS[0], "lowest-direct")
    too_low = {
        n: f"{low} stands there, {found[n]} is the oldest"
        for n, low in bounds().items()
        if not is_of(found[n], low)
    }
    assert not too_low


def is_of(version: str, bound: str) -> bool:
    """2.60.0 is of 2.60, 6.0 of 6, 4.11.0.86 of 4.11; 1.32.0 is not of 1."""
    first, second = ([*text.split("."), "0", "0"][:3] for text in (version, bound))
    return first == second


def test_no_python_that_has_wheels_is_left_out() -> None:
    with pytest.raises(AssertionError, match="ray"):
        resolved(f"3.{LAST}", "highest")


def test_the_quick_tests_pass_on_the_oldest(tmp_path: Path) -> None:
    """All but torch and Ray, gigabytes, which the environment lends."""
    oldest = resolved(f"3.{sys.version_info.minor}", "lowest-direct")
    chosen = [f"{name}=={version}" for name, version in oldest.items() if not LENT.match(name)]
    venv.create(tmp_path / "env", symlinks=True)
    python = str(tmp_path / "env" / "bin" / "python")
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, "--no-deps"]
    subprocess.run([*install, *chosen], check=True)
    packages = Path(
        subprocess.run([python, "-c", PURELIB], capture_output=True, text=True, check=True).stdout.strip()
    )
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    told = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    assert told == [oldest[name] for name in ("numpy", "pyarrow", "diffusers", "peft")], (
        "the lent ones are not in front"
    )
    done = quick_tests(python)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("python", [one for one in PYTHONS if one != f"3.{sys.version_info.minor}"])
def test_the_quick_tests_pass_on_the_other_pythons(python: str, tmp_path: Path) -> None:
    """Those that are here, with the newest of everything."""
    uv = [sys.executable, "-m", "uv"]
    if not (found := interpreter(python)):
        pytest.skip(f"no Python {python} on this machine")
    subprocess.run([*uv, "venv", "--quiet", "--python", found, str(tmp_path / "env")], check=True)
    own = str(tmp_path / "env" / "bin" / "python")
    done = subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", own, f"{ROOT}[dev]"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    done = quick_tests(own)
    assert done.returncode == 0, done.stdout[-5000:]


def interpreter(python: str) -> str | None:
    """Of pyenv, or on the path (where pyenv's own stand-ins answer for versions that are not chosen)."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [*map(str, pyenv.glob(f"versions/{python}.*/bin/python")), shutil.which(f"python{python}")]
    works = (
        one for one in found if one and subprocess.run([one, "-c", ""], capture_output=True).returncode == 0
    )
    return next(works, None)


def quick_tests(python: str) -> subprocess.CompletedProcess[str]:
    quick = [f"tests/{name}" for name in QUICK]
    return subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not ray and not slow and not gpu", *quick],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "OMP_NUM_THREADS": "1"},
    )


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
VERSIONS = (
    "from importlib.metadata import version; print(*map(version, ('numpy', 'pyarrow', 'diffusers', 'peft')))"
)
