"""The commands that the pages name: the command line or the Makefile accepts each, and those of the README
and of jobs/reference/ that need no network, GPU or cluster are run, in their order, on the result of `make
demo`. Commands of sh blocks are run by tests/project/test_documentation.py."""

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
PAGES = [*sorted(ROOT.glob("*.md")), *(ROOT / f for f in ("pipeline", "jobs", "infra", "tests"))]
RUN = [ROOT / "README.md", *sorted((ROOT / "jobs" / "reference").glob("*.md"))]
# What a page's words stand for, so that the line can be read as a command line and run.
WORDS = {
    "JOB": "jobs/demo.yaml",
    "OUTPUT": "build/demo",
    "DIR": "build/compacted",
    "URL": "http://127.0.0.1:8265",
}
IMAGES = ("FILE", "out/images/part-00000/ID-0.png")  # that a run made
ELSEWHERE = {  # words of commands that the test below does not run; why, and what does
    "submit": "needs a cluster: tests/cluster",
    "stop": "needs a cluster: tests/cluster",
    "SUBMISSION": "needs a cluster: tests/cluster",
    "warm": "tests/cluster/test_nodes.py",
    "view": "a server, until it is stopped: tests/outputs/report",
    "compare=THEIRS": "needs another system's images: tests/evaluation/test_compare.py",
    "model=sdxl": "needs the hub: tests/flow/test_pretrained.py runs its like",
    "jobs/generate_flux2_klein.yaml": "needs the hub: tests/models/flux2/test_job.py runs its like",
    "jobs/generate_sd15.yaml": "needs the hub: tests/flow/test_pretrained.py runs its like",
    "jobs/generate_sdxl.yaml": "needs the hub: tests/flow/test_pretrained.py runs its like",
    "jobs/finetune.yaml": "fifteen minutes: tests/training/test_finetune.py",
}


def texts() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for path in sorted(page.rglob("*.md")) if page.is_dir() else [page]:
            if path.name != "LOG.md":  # it keeps what was typed then
                yield str(path.relative_to(ROOT)), path.read_text()


def commands(text: str, sh_blocks: bool = False) -> list[list[str]]:
    """The arguments of each `context-diffusion` line of a page, its words filled in. sh_blocks: those of sh
    blocks too."""
    lines = re.findall(
        rf"^{'(?: {4})?' if sh_blocks else ' {4}'}context-diffusion (.*?)(?:\s+#.*)?$", text, flags=re.M
    )
    lines += re.findall(r"`context-diffusion ([a-z][^`]*)`", text)
    found = [[WORDS.get(word, word) for word in shlex.split(line)] for line in lines]
    return [
        arguments for arguments in found if not arguments[0].startswith("-")
    ]  # typer's own, --install-completion


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LINES = [(page, arguments) for page, text in texts() for arguments in commands(text, sh_blocks=True)]


def test_the_pages_are_read() -> None:
    assert len(LINES) >= 40
    assert {arguments[0] for page, arguments in LINES if page == "jobs/reference/cli.md"} == set(COMMANDS)


def test_each_command_has_a_heading() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "jobs/reference/cli.md").read_text(), flags=re.M)
    assert sorted(name for heading in headings for name in heading.split(", ") if name in COMMANDS) == sorted(
        COMMANDS
    )


@pytest.mark.parametrize(
    ("page", "arguments"), LINES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_the_command_line_takes_it(page: str, arguments: list[str]) -> None:
    command = COMMANDS[arguments[0]]
    command.make_context(arguments[0], arguments[1:])  # raises for an unknown option or a missing argument


def test_each_make_target_that_is_named_is_there() -> None:
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page, text in texts():
        named = set(re.findall(r"`make ([a-z-]+)", text)) | set(
            re.findall(r"^ {4}make ([a-z-]+)", text, flags=re.M)
        )
        assert named <= there, f"{page} names {named - there}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make demo` ran: the Makefile's own commands, in a folder that shares jobs/ and .venv with the
    checkout."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    (folder / ".venv").symlink_to(sys.prefix)
    make = [
        "make",
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
    ]  # as a part of `make test-full` it would print them
    make += ["-o", ".venv/installed", "demo"]  # -o: what is installed stays
    made = subprocess.run(make, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert made.returncode == 0, made.stderr
    assert (folder / "build/demo/report.html").exists()
    assert made.stdout.splitlines()[-1] == "report: build/demo/report.html"
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_run_on_the_result_of_make_demo(demo: Path) -> None:
    ran, image = [], str(next((demo / "build" / "demo" / "images").rglob("*.png")))
    environment = {**ENVIRONMENT, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    for arguments in dict.fromkeys(
        tuple(arguments) for page in RUN for arguments in commands(page.read_text())
    ):
        if any(word in ELSEWHERE for word in arguments):
            continue
        command = [
            sys.executable,
            "-m",
            "context_diffusion",
            *(image if word in IMAGES else word for word in arguments),
        ]
        done = subprocess.run(command, cwd=demo, capture_output=True, text=True, env=environment)
        result = json.loads(done.stdout.splitlines()[-1])
        allowed = (0, 3) if "failed" in result or "problems" in result else (0,)  # one row fails on purpose
        assert result["exit"] == done.returncode, arguments
        assert done.returncode in allowed, f"{arguments}: {done.stderr[-2000:]}"
        if arguments[0] in ("run", "status"):
            assert result["rows"] == 26
        if arguments[:2] == ("run", "jobs/demo.yaml"):
            assert (result["ok"], result["failed"]) == (25, 1)
            assert result["skipped"] == 26, "nothing was left to do"
        ran.append(arguments[0])
    images = [np.asarray(Image.open(path)) for path in (demo / "build" / "demo" / "images").rglob("*.png")]
    assert len(images) == 25
    assert min(pixels.std() for pixels in images) > 20, "an image of almost one colour shows nothing"
    assert set(ran) == COMMANDS.keys() - ELSEWHERE.keys() - {
        "init",
        "manifest",
        "preview",
    }  # those three are in sh blocks
    assert (demo / "build/compacted").exists()
    assert (demo / "build/demo-scores/scores.parquet").exists()
