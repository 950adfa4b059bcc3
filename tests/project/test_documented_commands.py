"""The commands that the pages name: each is one that the command line or the Makefile takes, and those of the README that
need no network, GPU or cluster are run, in their order, on what `make demo` left."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from context_diffusion.cli.main import app
from support.processes import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / f for f in ("pipeline", "jobs", "infra", "tests"))]
# What a page's words stand for, so that the line can be read as a command line and, in the README, run.
WORDS = {
    "JOB": "jobs/demo.yaml",
    "OUTPUT|SUBMISSION": "build/demo",
    "OUTPUT": "build/demo",
    "DIR": "build/compacted",
    "COLUMN": "scheduler",
    "URL": "http://127.0.0.1:8265",
    "[--set": "--set",
    "key=value]": "max_failed=5%",
}
PICTURES = ("FILE", "out/images/part-00000/ID-0.png")  # that a run made
ELSEWHERE = {  # why the test below does not run it, and what does
    "submit": "needs a cluster: tests/cluster",
    "stop": "needs a cluster: tests/cluster",
    "warm": "tests/cluster/test_nodes.py",
    "view": "a server, until it is stopped: tests/outputs/report",
    "jobs/evaluate.yaml": "needs another system's pictures: tests/evaluation/test_compare.py",
    "jobs/generate_sd15.yaml": "needs the hub: tests/flow/test_pretrained.py runs its like",
    "jobs/finetune.yaml": "fifteen minutes: tests/training/test_finetune.py",
}


def texts() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for path in sorted(page.rglob("*.md")) if page.is_dir() else [page]:
            if path.name != "LOG.md":  # it keeps what was typed then
                yield str(path.relative_to(ROOT)), path.read_text()


def commands(text: str) -> list[list[str]]:
    """The arguments of each `context-diffusion` line of a page, its words filled in."""
    lines = re.findall(r"^ {4}context-diffusion (.*?)(?:\s+#.*)?$", text, flags=re.M)
    lines += re.findall(r"`context-diffusion ([a-z][^`]*)`", text)
    asked = [[WORDS.get(word, word) for word in shlex.split(line)] for line in lines]
    return [arguments for arguments in asked if not arguments[0].startswith("-")]  # typer's own, --install-completion


LINES = [(page, arguments) for page, text in texts() for arguments in commands(text)]


def test_the_pages_are_read() -> None:
    assert len(LINES) >= 15
    assert {"run", "validate", "submit", "status", "report", "verify", "compact"} <= {arguments[0] for _, arguments in LINES}


@pytest.mark.parametrize(("page", "arguments"), LINES, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_the_command_line_takes_it(page: str, arguments: list[str]) -> None:
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], arguments[1:])  # raises for an unknown option or a missing argument


def test_each_make_target_that_is_named_is_there() -> None:
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page, text in texts():
        named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^ {4}make ([a-z-]+)", text, flags=re.M))
        assert named <= there, f"{page} names {named - there}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make demo` ran: the Makefile's own commands, in a folder that shares jobs/ and .venv with the checkout."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    (folder / ".venv").symlink_to(sys.prefix)
    make = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile")]  # as a part of `make test-full` it would print them
    make += ["-o", ".venv/installed", "demo"]  # -o: what is installed stays
    made = subprocess.run(make, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert made.returncode == 0, made.stderr
    assert (folder / "build/demo/report.html").exists()
    assert made.stdout.splitlines()[-1] == "report: build/demo/report.html"
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_readmes_commands_run_on_what_make_demo_left(demo: Path) -> None:
    ran, picture = [], str(next((demo / "build" / "demo" / "images").rglob("*.png")))
    for arguments in commands((ROOT / "README.md").read_text()):
        if arguments[0] in ELSEWHERE or arguments[1] in ELSEWHERE:
            continue
        done = subprocess.run(
            [sys.executable, "-m", "context_diffusion", *(picture if word in PICTURES else word for word in arguments)],
            cwd=demo,
            capture_output=True,
            text=True,
            env={**ENVIRONMENT, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["exit"] == 0, arguments
        if arguments[0] in ("run", "status"):
            assert told["rows"] == 28
        if arguments[0] == "run":
            assert (told["ok"], told["skipped"]) == (28, 28), "nothing was left to do"
        ran.append(arguments[0])
    made = [np.asarray(Image.open(path)) for path in (demo / "build" / "demo" / "images").rglob("*.png")]
    assert len(made) == 28
    assert min(pixels.std() for pixels in made) > 20, "a picture of almost one colour shows nothing"
    first, then = ["doctor", "validate", "run", "status", "report", "verify", "reproduce"], ["run", "run", "compact"]
    assert ran == [*first, *then, "reproduce", "run"]
    assert (demo / "build/compacted").exists()
