"""Messages never end a command: whatever stderr and stdout are, and whatever is said on them. Real processes,
real streams."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.manifests import job_values, write_manifest
from support.processes import COMMAND, ENVIRONMENT, PATIENCE_S
from support.user_images import write_base

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
SIGNS = "jos\N{LATIN SMALL LETTER E WITH ACUTE}"
SURROGATE = b"\x80".decode("utf-8", "surrogateescape")  # of a file name that is no UTF-8


@contextmanager
def stream(kind: str) -> Iterator[int]:
    """A file descriptor that takes nothing."""
    if kind == "full":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, number = os.pipe()
        os.close(reading)
    yield number
    os.close(number)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that has much to say: an OUTPUT and rows with signs that ASCII lacks, and a row that fails."""
    folder = tmp_path_factory.mktemp(SIGNS)
    manifest = write_manifest(folder / "in", 6, {2: {"query": f"gone-{SIGNS}.png", "id": SIGNS}})
    values = job_values(manifest, folder / SIGNS, model=write_base(folder / "tiny"), rows_per_part=3)
    path = folder / f"job-{SURROGATE}.json"
    path.write_text(json.dumps(values))
    return str(path)


def call(
    *command: str, stderr: int = subprocess.PIPE, **environment: str
) -> tuple[int, dict[str, Any], bytes]:
    """-> the code, stdout's last line, stderr."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT | environment, timeout=PATIENCE_S
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr or b""


@pytest.mark.parametrize("kind", ["full", "broken"])
def test_stderr_that_takes_nothing_changes_no_result(job: str, kind: str) -> None:
    with stream(kind) as stderr:
        code, told, _ = call(*COMMAND, "validate", job, stderr=stderr)
    assert (code, told["exit"], told["rows"], len(told["problems"])) == (3, 3, 6, 1)


def test_a_process_without_stderr_has_its_result_and_writes_into_no_other_file(job: str) -> None:
    code, told, _ = call("sh", "-c", '"$@" 2>&-', "sh", *COMMAND, "validate", job)
    assert (code, told["exit"], told["rows"], len(told["problems"])) == (3, 3, 6, 1)


@pytest.mark.parametrize("kind", ["full", "broken"])
def test_stdout_that_takes_nothing_leaves_the_code(job: str, kind: str) -> None:
    with stream(kind) as stdout:
        done = subprocess.run(
            [*COMMAND, "validate", job], stdout=stdout, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
    assert (done.returncode, b"6 rows in 2 shards" in done.stderr) == (3, True)


def test_signs_that_the_encoding_lacks_are_escaped(job: str, tmp_path: Path) -> None:
    code, told, err = call(*COMMAND, "validate", job, **ASCII)
    assert (code, told["exit"]) == (3, 3)
    assert b"gone-jos\\xe9.png does not exist" in err
    gone = str(tmp_path / f"{SURROGATE}.yaml")
    code, told, err = call(*COMMAND, "validate", gone, **ASCII)
    assert (code, told["exit"]) == (2, 2)
    assert b"\\udc80.yaml" in err


@pytest.mark.ray
@pytest.mark.parametrize("form", ["text", pytest.param("json", marks=pytest.mark.slow)])
def test_a_run_whose_messages_nobody_can_take_is_made(job: str, tmp_path: Path, form: str) -> None:
    """Its driver is another process, with a stream of its own: one run without stderr at all, one whose
    reader is gone."""
    output = str(tmp_path / SIGNS)
    told = ["run", job, "--set", f"output={output}", "--log-format", form]
    if form == "text":
        code, summary, _ = call("sh", "-c", '"$@" 2>&-', "sh", *COMMAND, *told, **ASCII)
    else:
        with stream("broken") as stderr:
            code, summary, _ = call(*COMMAND, *told, stderr=stderr, **ASCII)
    assert (code, summary["ok"], summary["failed"], summary["output"]) == (3, 5, 1, output)
    assert (Path(output) / "_SUCCESS").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_in_a_notebook_tells_plain_lines(job: str, tmp_path: Path) -> None:
    """Jupyter's kernel sets FORCE_COLOR, and stderr is no terminal; in a terminal there is a bar."""
    told = ["run", job, "--set", f"output={tmp_path / 'out'}"]
    code, _, err = call(*COMMAND, *told, FORCE_COLOR="1", CLICOLOR_FORCE="1", TERM="xterm-color", NO_COLOR="")
    assert code == 3
    assert b"6/6 rows" in err
    assert b"\x1b" not in err
    own, terminal = pty.openpty()
    told[-1] = f"output={tmp_path / 'again'}"
    subprocess.run(
        [*COMMAND, *told],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=ENVIRONMENT | {"TERM": "xterm"},
        timeout=PATIENCE_S,
    )
    os.close(terminal)
    assert b"\x1b[" in os.read(own, 65536)
    os.close(own)
