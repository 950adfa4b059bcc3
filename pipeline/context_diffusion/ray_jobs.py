"""Ray's Jobs API over plain HTTP: submit, follow, stop. The standard library alone, so that an orchestrator needs this one
file and neither Ray nor the package.

    jobs = RayJobs.known()          # the cluster and the token that the environment names
    submission = submit(jobs, {"kind": "generate", "manifest": "s3://...", "output": "s3://..."})
    code = jobs.follow(submission.id, print)
    summary = last_line(jobs.logs(submission.id))
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shlex
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVE = ("PENDING", "RUNNING")
EXIT_WRONG, EXIT_STOPPED, EXIT_LOST = 2, 143, 75
FIRST_S = 15.0  # for a first answer: more likely the address is wrong
PATIENCE_S = 60.0  # a cluster that has answered may be away, or just starting, for so long
TELL_S = 3.0  # then people are told what is waited for
EVERY_S = 2.0
STOP_MARGIN_S = 15  # that a run has to end after its grace
Job = dict[str, Any]
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as `ray job submit` looks them up
PORT_HINT = "; is it that address? A dashboard's port is 8265 where nothing else is said"
STARTING = ("No available agent", "Cannot connect to host", "Server disconnected")  # a head in its first seconds, by 500
OTHER_PYTHON = ("pip", "uv", "conda", "container", "image_uri")  # of a runtime_env: `python` is then its own
# $p: the Python that Ray runs on, from the command line of the raylet, whose child the job's supervisor is, whose child this
# shell is. `python` on the cluster's PATH may be another one, or none.
OWN_PYTHON = r"""{ p=$(tr '\0' '\n' < /proc/$(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status)/cmdline |
sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p'); } 2> /dev/null; [ -x "$p" ] || p=python"""
IS_THERE = """"$p" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("context_diffusion") is None)' || {
echo "error: $(command -v "$p" || echo "$p"), the Python of this cluster, lacks context_diffusion: \\
install it there, or send it along by submit --wheel FILE"
exit 2; }"""


class RayJobsError(Exception):
    """The cluster cannot be reached or refuses; the message says what to do."""

    exit_code = EXIT_LOST


class NoClusterError(RayJobsError):
    """Nothing says where it is."""

    exit_code = EXIT_WRONG


class AnotherJobError(RayJobsError):
    """One is writing to the same OUTPUT."""

    exit_code = EXIT_WRONG


@dataclass(frozen=True)
class Submission:
    """attached: it ran already. output: the OUTPUT that `status` tells of."""

    id: str
    attached: bool
    output: str


def known_address() -> str | None:
    """The dashboard that the environment names."""
    return next((value for name in ADDRESSES if (value := os.environ.get(name, "")).startswith("http")), None)


def known_token() -> str | None:
    """As Ray looks it up: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


class _PassingError(Exception):
    """It may be over in a moment."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Waiting:
    """Tells people once, when an answer is long in coming, what is waited for and why."""

    def __init__(self, address: str, seconds: float, tell: Callable[[str], object]) -> None:
        self.address, self.seconds, self.tell = address, seconds, tell
        self.reason = "no answer yet"
        self._timer = threading.Timer(TELL_S, self._say)
        self._timer.daemon = True

    def __enter__(self) -> _Waiting:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _say(self) -> None:
        self.tell(f"waiting up to {self.seconds:g} s for the Ray dashboard at {self.address}: {self.reason}")


@dataclass
class RayJobs:
    """address: of the dashboard, http://HOST:8265. first_s: how long it may take to answer for the first time, patience_s:
    later; tell: given a line where one waits for it."""

    address: str
    token: str | None = None
    patience_s: float = PATIENCE_S
    first_s: float = FIRST_S
    tell: Callable[[str], object] = _to_stderr
    _answered: bool = field(default=False, init=False)

    @classmethod
    def known(cls, address: str | None = None, tell: Callable[[str], object] = _to_stderr) -> RayJobs:
        """That cluster, or the one that the environment names. Raises NoClusterError."""
        if not (found := address or known_address()):
            raise NoClusterError("no cluster: give its address, http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
        if not found.startswith(("http://", "https://")):
            raise NoClusterError(f"{found}: what is needed here is the dashboard's address, http://HOST:8265")
        return cls(found, known_token(), tell=tell)

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> bool:
        """False where a job of that id is there already: Ray takes an id once. Raises RayJobsError."""
        if self.get(submission_id):
            return False
        asked = {"entrypoint": entrypoint, "submission_id": submission_id, "runtime_env": runtime_env, "metadata": metadata}
        try:
            self._call("POST", "/api/jobs/", asked, again=STARTING)
        except RayJobsError as error:
            if "already exists" in str(error):  # ours, its answer lost, or one that came first
                return False
            raise
        return True

    def get(self, submission_id: str) -> dict[str, Any] | None:
        """status (PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED), driver_exit_code, message, metadata, start_time, ..."""
        try:
            found: dict[str, Any] = self._call("GET", f"/api/jobs/{submission_id}")
        except KeyError:
            return None
        return found

    def list(self, prefix: str) -> list[dict[str, Any]]:
        """The jobs whose submission_id begins so, the oldest first."""
        found = [job for job in self._call("GET", "/api/jobs/") if str(job.get("submission_id") or "").startswith(prefix)]
        return sorted(found, key=lambda job: job.get("start_time") or 0)

    def logs(self, submission_id: str) -> str:
        return str(self._call("GET", f"/api/jobs/{submission_id}/logs")["logs"] or "")

    def stop(self, submission_id: str) -> bool:
        """Asks for it: SIGTERM, and SIGKILL when RAY_JOB_STOP_WAIT_TIME_S are over. False where nothing runs."""
        try:
            return bool(self._call("POST", f"/api/jobs/{submission_id}/stop", {})["stopped"])
        except KeyError:
            raise RayJobsError(f"{self.address} knows no job {submission_id}") from None

    def upload(self, name: str, data: bytes) -> str:
        """A package for a runtime_env, kept by the cluster's head. -> its URI."""
        try:
            self._call("GET", f"/api/packages/gcs/{name}")
        except KeyError:
            self._call("PUT", f"/api/packages/gcs/{name}", data)
        return f"gcs://{name}"

    def follow(self, submission_id: str, tell: Callable[[str], object], every_s: float = EVERY_S) -> int:
        """Tells each new line of the job's log until the job ends. -> the code that its entrypoint ended with."""
        told = 0
        while True:
            job = self.get(submission_id)
            if job is None:
                raise RayJobsError(f"{self.address} knows no job {submission_id}: was the cluster started anew? Submit it again")
            ended = job["status"] not in ACTIVE
            if job["status"] != "PENDING":
                text = self.logs(submission_id)
                whole = len(text) if ended else text.rfind("\n") + 1
                for line in text[told:whole].splitlines():
                    tell(line)
                told = max(told, whole)
            if ended:
                return exit_code(job)
            time.sleep(every_s)

    def _call(self, method: str, path: str, body: Any = None, again: tuple[str, ...] = ()) -> Any:
        """The answer's JSON. Raises KeyError for 404, RayJobsError for all else; a cluster that does not answer, or says
        one of `again`, is asked again for a while."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers, method=method)
        begun = time.monotonic()
        with _Waiting(self.address, self.patience_s if self._answered else self.first_s, self.tell) as waiting:
            while True:
                try:
                    return self._ask(request, path, again, begun)
                except _PassingError as error:
                    waiting.reason, waiting.seconds = str(error), self.patience_s if self._answered else self.first_s
                    if time.monotonic() + 1 > begun + waiting.seconds:
                        raise RayJobsError(f"{error}{'' if self._answered else PORT_HINT}") from None
                time.sleep(1)

    def _ask(self, request: urllib.request.Request, path: str, again: tuple[str, ...], begun: float) -> Any:
        """Once. Raises _PassingError too."""
        timeout = 60 if self._answered else max(begun + self.first_s - time.monotonic(), 1)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                found = json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            self._answered |= error.code not in (502, 503, 504)  # those are a proxy's
            raise self._refusal(error.code, path, text, again) from None
        except (http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) or self._answered:  # it closed the connection, or broke off
                raise _PassingError(f"no Ray dashboard answers at {self.address}: {error}") from None
            wrong = f"what answers at {self.address} is no Ray dashboard: {error!r:.200}"
            raise RayJobsError(wrong + PORT_HINT) from None
        except OSError as error:  # URLError too
            raise _PassingError(f"no Ray dashboard answers at {self.address}: {error}") from None
        self._answered = True
        return found

    def _refusal(self, code: int, path: str, text: str, again: tuple[str, ...]) -> Exception:
        """What an HTTP status means."""
        if code == 404 and "does not exist" in text:
            return KeyError(path)
        if code == 404:
            return RayJobsError(f"what answers at {self.address} is no Ray dashboard: it knows no {path}{PORT_HINT}")
        if code in (401, 403):
            return RayJobsError(self._token_hint(code))
        wrong = f"{self.address}{path} answered {code}: {text.strip()[-500:]}"
        passing = code in (502, 503, 504) or any(part in text for part in again)
        return _PassingError(wrong) if passing else RayJobsError(wrong)

    def _token_hint(self, code: int) -> str:
        wrong = "refuses the token" if self.token else "asks for a token and none is set here"
        hint = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        if os.environ.get("RAY_AUTH_MODE") != "token":
            hint += ", and RAY_AUTH_MODE=token, which is not set here, for Ray's own commands and `run`"
        return f"{self.address} {wrong} ({code}): {hint}"


def submit(
    jobs: RayJobs,
    job: Job | list[Job],
    flags: tuple[str, ...] = (),
    runtime_env: dict[str, Any] | None = None,
    grace_s: float = 20,
    log_format: str = "text",
) -> Submission:
    """A job file's values, or those of its several jobs, paths such as the cluster sees. flags: of `context-diffusion run`,
    as --retry-failed.

    The id follows from job and OUTPUT, of several jobs the first generate job's (else the last's): a job that runs is
    joined, one that has ended gets another attempt, which resumes. Raises AnotherJobError, RayJobsError.
    """
    listed = job if isinstance(job, list) else [job]
    generating = [one for one in listed if one.get("kind") == "generate"]
    output = str((generating or listed[-1:])[0]["output"])
    begin = f"{_slug(output)}-{_digest(output, 8)}-"
    value = listed[0] if len(listed) == 1 else listed
    prefix = f"{begin}{_digest([value, flags], 6)}-"
    for one in jobs.list(begin):
        name = str(one["submission_id"])
        if one["status"] in ACTIVE and not name.startswith(prefix):
            wrong = f"{output}: another job, {name}, is writing there; wait for it, or `context-diffusion stop {name}`"
            raise AnotherJobError(wrong)
        if one["status"] in ACTIVE:
            return Submission(name, True, output)
    attempts = [int(str(one["submission_id"]).rsplit("-", 1)[1]) for one in jobs.list(prefix)]
    name = f"{prefix}{max(attempts, default=0) + 1}"
    grace = ["--grace", f"{grace_s:g}"] if generating else []
    log = ["--log-format", log_format] if log_format != "text" else []
    entrypoint = entrypoint_of(["run", "/dev/stdin", *flags, *grace, *log], value, runtime_env)
    environment = dict(runtime_env or {})
    wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_s) + STOP_MARGIN_S)}
    environment["env_vars"] = wait | environment.get("env_vars", {})
    new = jobs.submit(name, entrypoint, environment, {"output": output})
    return Submission(name, not new, output)


def entrypoint_of(words: list[str], job: Job | list[Job], runtime_env: dict[str, Any] | None = None) -> str:
    """A command of ours that is given a job on its stdin, as Ray Jobs' shell runs it: on the Python that Ray itself runs on,
    or that the runtime_env brings; it ends with 2 and says so where that lacks the package."""
    python = "p=python" if any(key in (runtime_env or {}) for key in OTHER_PYTHON) else OWN_PYTHON
    given = f"printf %s {shlex.quote(json.dumps(job, ensure_ascii=False))}"
    return f'{python}\n{IS_THERE}\n{given} | "$p" -m context_diffusion {shlex.join(words)}'


def last_line(log: str) -> dict[str, Any]:
    """What a command of ours said at its end; empty where it said nothing."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            if "event" not in found:  # of a log as JSON
                return found
    return {}


def _slug(output: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", output.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:24] or "job"


def _digest(value: Any, length: int) -> str:
    """The order of keys counts: a matrix's gives the index of its images."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]


def exit_code(job: dict[str, Any]) -> int:
    """Of a job that has ended: its entrypoint's, 143 where it was stopped, 75 where its node or cluster was lost."""
    if job["status"] == "SUCCEEDED":
        return 0
    if job["status"] == "STOPPED":
        return EXIT_STOPPED
    return int(job["driver_exit_code"]) if job.get("driver_exit_code") else EXIT_LOST
