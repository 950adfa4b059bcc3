"""Clusters that are not there, or are something else: what `submit`, `status` and `stop` say, and when they
give up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from context_diffusion.ray_jobs import RayJobs, RayJobsError, entrypoint_of
from support.http_server import Answer, serving
from support.manifests import job_values, write_manifest
from support.ports import free_port
from support.processes import COMMAND, ENVIRONMENT


@contextmanager
def dashboard(*answers: tuple[int, str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """An HTTP server that gives these answers in turn, the last one ever after. -> its address, and what it
    was asked."""
    asked: list[tuple[str, str]] = []

    def answer(method: str, path: str) -> Answer:
        asked.append((method, path))
        status, text = answers[min(len(asked), len(answers)) - 1]
        return status, {}, text.encode()

    with serving(answer) as address:
        yield address, asked


@contextmanager
def listener(says: bytes = b"") -> Iterator[str]:
    """A port that takes connections and answers with these bytes, or never."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            held = []
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                if says:
                    with held.pop() as connection:
                        connection.recv(65536)  # else its end is a reset, which the answer may be lost by
                        connection.sendall(says)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def call(*words: str, **more: str) -> tuple[int, str, list[tuple[float, str]]]:
    """A command: its code, its error, and the lines of stderr with the seconds after which each was said."""
    begun, told = time.monotonic(), list[tuple[float, str]]()
    process = subprocess.Popen(
        [*COMMAND, *words], env=ENVIRONMENT | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    told = [(time.monotonic() - begun, line) for line in process.stderr]
    summary = json.loads(process.stdout.read().splitlines()[-1])
    assert process.wait() == summary["exit"]
    return summary["exit"], summary["error"], told


def words_of(command: str, folder: Path) -> list[str]:
    if command != "submit":
        return [command, "out-00000000-000000-1"]
    (folder / "job.json").write_text(json.dumps(job_values(write_manifest(folder / "in", 2), folder / "out")))
    return [command, str(folder / "job.json")]


@pytest.mark.parametrize(
    ("command", "silent"),
    [
        ("status", True),
        pytest.param("stop", False, marks=pytest.mark.slow),
        pytest.param("submit", False, marks=pytest.mark.slow),
    ],
)
def test_an_address_where_nobody_answers_is_told_soon_and_given_up(
    command: str, silent: bool, tmp_path: Path
) -> None:
    with listener() as never:
        address = never if silent else f"http://127.0.0.1:{free_port()}"
        begun = time.monotonic()
        code, error, told = call(*words_of(command, tmp_path), "--address", address)
        seconds = time.monotonic() - begun
    assert (code, f"no Ray dashboard answers at {address}" in error) == (75, True)
    first, line = next((at, line) for at, line in told if "waiting up to 15 s" in line)
    assert address in line
    assert first < seconds - 5, "long before it gives up"
    assert seconds < 45, "its patience for a cluster that has answered before is a minute"


def test_what_is_no_dashboard_is_refused_at_once(tmp_path: Path) -> None:
    with listener(b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0@\0") as grpc:  # as Ray's other ports begin
        code, error, _ = call("status", "nothing-1", "--address", grpc)
        assert (code, "not a Ray dashboard" in error, "8265" in error) == (75, True, True)
    with dashboard((404, "<h1>Not Found</h1>")) as (web, _):
        for words in (["status", "nothing-1"], ["stop", "nothing-1"], words_of("submit", tmp_path)):
            code, error, _ = call(*words, "--address", web)
            assert (code, f"{web} is not a Ray dashboard" in error) == (75, True)
    for address in ("ray://127.0.0.1:10001", "127.0.0.1:8265", "auto"):
        code, error, _ = call("stop", "nothing-1", "--address", address)
        assert (code, address in error, "http://HOST:8265" in error) == (2, True, True)


@pytest.mark.parametrize("mode", ["", "token"])
@pytest.mark.parametrize("token", ["", "another"])
def test_a_cluster_that_asks_for_a_token_says_what_is_not_set_here(
    mode: str, token: str, tmp_path: Path
) -> None:
    settings = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    with dashboard((401, "Unauthorized")) as (address, _):
        code, error, _ = call("status", "nothing-1", "--address", address, **settings)
    assert code == 75
    assert "RAY_AUTH_TOKEN_PATH" in error
    assert ("none is set here" in error) is (not token)
    assert ("RAY_AUTH_MODE=token, which is not set here" in error) is (mode != "token")


def test_a_head_that_has_just_started_is_asked_again_and_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = (500, "No available agent to submit job, please try again later.")
    monkeypatch.setattr("context_diffusion.ray_jobs.NOTICE_S", 0.5)
    lines: list[str] = []
    with dashboard(busy, busy, (200, "{}")) as (address, asked):
        assert RayJobs(address, tell=lines.append).submit("a-1", "true")
    assert [method for method, _ in asked] == ["POST", "POST", "POST"]
    assert len(lines) == 1
    assert "waiting up to 60 s" in lines[0]
    assert "No available agent" in lines[0]
    with dashboard((500, "Traceback: it is wrong")) as (address, asked):
        with pytest.raises(RayJobsError, match="it is wrong"):
            RayJobs(address).submit("a-1", "true")
        assert len(asked) == 1, "what does not pass is not tried again"


def test_a_python_that_lacks_the_package_is_named_by_the_job_itself(tmp_path: Path) -> None:
    """The shell that Ray Jobs would start; here no raylet stands above it, so `python` on PATH is taken."""
    (tmp_path / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    entrypoint = entrypoint_of(["run", "/dev/stdin"], {"kind": "generate"})
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(entrypoint, shell=True, capture_output=True, text=True, env=path)
    assert done.returncode == 2
    assert done.stdout.startswith(
        f"error: {tmp_path}/python, the Python of this cluster, lacks context_diffusion: install it there"
    )
    brought = {"pip": ["context-diffusion"]}
    assert "python_worker_command" not in entrypoint_of(["run", "/dev/stdin"], {}, brought), (
        "its own `python` comes first"
    )
