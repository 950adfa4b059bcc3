"""infra/Dockerfile without a Docker daemon: linted, and its build steps run in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "Dockerfile"
Steps = list[tuple[str, str]]


def stages() -> dict[str, tuple[str, Steps]]:
    """Name -> (what it is built from, its instructions)."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    found: dict[str, tuple[str, Steps]] = {}
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            origin, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            found[name] = (origin, [])
        elif word and not word.startswith("#"):
            found[name][1].append((word, rest.strip()))
    return found


def steps_to(target: str) -> Steps:
    """All instructions that lead to a stage, from its first."""
    origin, own = stages()[target]
    return (steps_to(origin) if origin in stages() else []) + own


def test_the_end_image_is_not_root_keeps_models_in_a_volume_and_has_no_compiler() -> None:
    for target in ("cpu", "cuda"):
        steps = steps_to(target)
        assert ("USER", "1000") in steps
        assert ("VOLUME", "/models") in steps
        assert any(word == "HEALTHCHECK" for word, _ in steps)
        assert not re.search(
            r"gcc|g\+\+|build-essential|clang|cmake|nvidia/cuda", " ".join(rest for _, rest in steps)
        )
        assert ("COPY", f"--from=build-{target} /opt/venv /opt/venv") in steps


def test_the_lock_holds_the_projects_own_requirements_and_names_no_cuda_build() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+)$", lock, flags=re.M))
    wanted = re.findall(
        r'^    "([a-z0-9-]+)',
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0],
        re.M,
    )
    assert len(wanted) > 15
    assert set(wanted) <= pinned.keys()
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]
    assert "+" not in pinned["torch"]
    assert "://" not in lock


@pytest.mark.slow
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(DOCKERFILE)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_build_steps_make_an_environment_that_runs(tmp_path: Path) -> None:
    """RUN as it stands, /opt/venv and /src in a folder here; python is the one of this test."""
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).resolve().parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    environment |= {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
    }

    def here(text: str) -> str:
        return text.replace("/opt/venv", str(venv))

    for word, rest in steps_to("build-cpu"):
        if word == "COPY":
            *names, to = shlex.split(rest)
            for name in names:
                target = source / (name if to == "./" else to)
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, target)
        elif word == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-ec", here(rest)], cwd=source, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]
    [command] = [rest for word, rest in steps_to("cpu") if word == "HEALTHCHECK"]
    healthy = [here(one) for one in re.findall(r'"([^"]*)"', command.partition("CMD")[2])]
    inside = {"PATH": str(venv / "bin"), "HOME": str(tmp_path)}
    for words in (healthy, ["context-diffusion", "--help"], ["ray", "--version"]):
        subprocess.run(
            [str(venv / "bin" / words[0]), *words[1:]],
            check=True,
            cwd=tmp_path,
            env=inside,
            capture_output=True,
        )
    code = (
        "from context_diffusion import ContextDiffusion; "
        "print(ContextDiffusion.from_pretrained().backbone.image_size)"
    )
    made = subprocess.run(
        [str(venv / "bin" / "python"), "-c", code], cwd=tmp_path, env=inside, capture_output=True, text=True
    )
    assert made.stdout.strip() == "128", made.stderr[-2000:]
