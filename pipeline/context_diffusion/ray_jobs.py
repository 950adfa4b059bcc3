"""A client of Ray's Jobs API over HTTP. Needs only the standard library, not Ray and not the package.

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
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

ACTIVE = ("PENDING", "RUNNING")
EXIT_WRONG, EXIT_STOPPED, EXIT_LOST = 2, 143, 75
FIRST_S = 15.0  # the limit for the first answer: the address may be wrong
PATIENCE_S = 60.0  # the limit for a cluster that has answered before, or is just starting
NOTICE_S = 3.0  # after so long a wait is reported
STOP_MARGIN_S = 15  # time to end after the grace period
Job = dict[str, Any]
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in the order of `ray job submit`
PORT_HINT = "; check the address: the default port of a dashboard is 8265"
STARTING = ("No available agent", "Cannot connect to host", "Server disconnected")  # a new head's errors
OTHER_PYTHON = ("pip", "uv", "conda", "container", "image_uri")  # keys of a runtime_env with its own `python`
# Sets $p to the Python that Ray runs on, which the raylet's command line names; the raylet is the parent of
# this shell's parent. `python` on the cluster's PATH may be missing, or another one.
OWN_PYTHON = r"""{ p=$(tr '\0' '\n' < /proc/$(sed -n 's/^PPid:[^0-9]*//p' /proc/$PPID/status)/cmdline |
sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p'); } 2> /dev/null; [ -x "$p" ] || p=python"""
CHECK = """"$p" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("context_diffusion"))' || {
echo "error: $(command -v "$p" || echo "$p"), the Python of this cluster, lacks context_diffusion: \\
install it there, or ship it with submit --wheel FILE"
exit 2; }"""


class RayJobsError(Exception):
    """The cluster cannot be reached or refuses a request; the message says what to do."""

    exit_code = EXIT_LOST


class WrongSubmissionError(RayJobsError):
    """A retry does not help: no cluster is named, or another job writes to the same OUTPUT."""

    exit_code = EXIT_WRONG


@dataclass(frozen=True)
class Submission:
    """A submitted job. attached: it was already running. output: its OUTPUT."""

    id: str
    attached: bool
    output: str


def known_address() -> str | None:
    """Return the dashboard's address from the environment."""
    return next((value for name in ADDRESSES if (value := os.environ.get(name, "")).startswith("http")), None)


def known_token() -> str | None:
    """Return the token as Ray finds it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    try:
        return os.environ.get("RAY_AUTH_TOKEN") or path.expanduser().read_text().strip() or None
    except OSError:
        return None


def token_hint() -> str:
    """Return how to set the token of a cluster."""
    hint = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    mode_hint = ", and RAY_AUTH_MODE=token, which is not set here, for Ray's own commands and `run`"
    return hint if os.environ.get("RAY_AUTH_MODE") == "token" else hint + mode_hint


class _TransientError(Exception):
    """A request failed, and may succeed in a moment."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class RayJobs:
    """A cluster. address: of its dashboard, http://HOST:8265. first_s: the limit for the first answer;
    patience_s: for later ones. tell: receives a line when an answer takes long."""

    address: str
    token: str | None = None
    patience_s: float = PATIENCE_S
    first_s: float = FIRST_S
    tell: Callable[[str], object] = _to_stderr
    _answered: bool = field(default=False, init=False)

    @classmethod
    def known(cls, address: str | None = None, tell: Callable[[str], object] = _to_stderr) -> RayJobs:
        """Return the cluster at the address or in the environment. Raises WrongSubmissionError."""
        url = address or known_address() or ""
        if not url.startswith(("http://", "https://")):
            hint = "give its dashboard's address, http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
            raise WrongSubmissionError(f"{url or 'no cluster'}: {hint}")
        return cls(url, known_token(), tell=tell)

    def submit(
        self, submission_id: str, entrypoint: str, runtime_env: Job | None = None, metadata: Job | None = None
    ) -> bool:
        """Submit a job. Returns False if a job with that id exists. Raises RayJobsError."""
        body = {"entrypoint": entrypoint, "submission_id": submission_id}
        try:
            self._call("POST", "/api/jobs/", {**body, "runtime_env": runtime_env, "metadata": metadata})
        except RayJobsError as error:
            if "already exists" in str(error):  # also if the answer to an earlier try was lost
                return False
            raise
        return True

    def get(self, submission_id: str) -> Job | None:
        """Return status (PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED), driver_exit_code, message, etc."""
        try:
            return dict(self._call("GET", f"/api/jobs/{submission_id}"))
        except KeyError:
            return None

    def list(self, prefix: str) -> list[Job]:
        """Return the jobs whose submission_id starts with the prefix."""
        jobs = self._call("GET", "/api/jobs/")
        return [job for job in jobs if str(job.get("submission_id") or "").startswith(prefix)]

    def logs(self, submission_id: str) -> str:
        """Return the log of a job."""
        return str(self._call("GET", f"/api/jobs/{submission_id}/logs")["logs"] or "")

    def stop(self, submission_id: str) -> bool:
        """Send SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S. Returns False if it is not running."""
        try:
            return bool(self._call("POST", f"/api/jobs/{submission_id}/stop", {})["stopped"])
        except KeyError:
            raise RayJobsError(f"{self.address} has no job {submission_id}") from None

    def upload(self, name: str, data: bytes) -> str:
        """Store a package for a runtime_env on the cluster's head. Returns its URI."""
        try:
            self._call("GET", f"/api/packages/gcs/{name}")
        except KeyError:
            self._call("PUT", f"/api/packages/gcs/{name}", data)
        return f"gcs://{name}"

    def follow(self, submission_id: str, tell: Callable[[str], object], every_s: float = 2) -> int:
        """Pass each line of a job's log to `tell` until the job ends. Returns its exit code."""
        passed = 0  # characters of the log
        while True:
            job = self.get(submission_id)
            if job is None:
                raise RayJobsError(
                    f"{self.address} has no job {submission_id}; if it restarted, submit again"
                )
            ended = job["status"] not in ACTIVE
            if job["status"] != "PENDING":
                text = self.logs(submission_id)
                end = len(text) if ended else text.rfind("\n") + 1
                for line in text[passed:end].splitlines():
                    tell(line)
                passed = max(passed, end)
            if ended:
                return exit_code(job)
            time.sleep(every_s)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer's JSON, after retries if need be. Raises KeyError for 404, else RayJobsError."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        request = urllib.request.Request(self.address.rstrip("/") + path, data, headers, method=method)
        began = time.monotonic()
        reason = "no answer yet"
        text = f"s for the Ray dashboard at {self.address}"
        timer = Timer(NOTICE_S, lambda: self.tell(f"waiting up to {self._limit:g} {text}: {reason}"))
        timer.daemon = True
        timer.start()
        try:
            while True:
                try:
                    return self._request(request, path, began)
                except _TransientError as error:
                    reason = str(error)
                    if time.monotonic() + 1 > began + self._limit:
                        raise RayJobsError(f"{reason}{'' if self._answered else PORT_HINT}") from None
                time.sleep(1)
        finally:
            timer.cancel()

    @property
    def _limit(self) -> float:
        return self.patience_s if self._answered else self.first_s

    def _request(self, request: urllib.request.Request, path: str, began: float) -> Any:
        """Send a request once. Raises _TransientError too."""
        timeout = 60 if self._answered else max(began + self.first_s - time.monotonic(), 1)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer = json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            self._answered |= error.code not in (502, 503, 504)  # those are a proxy's
            raise self._refusal(error.code, path, text) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) or self._answered:  # nothing listens, or the connection was closed
                raise _TransientError(f"no Ray dashboard answers at {self.address}: {error}") from None
            raise RayJobsError(f"{self.address} is not a Ray dashboard: {error!r:.200}{PORT_HINT}") from None
        self._answered = True
        return answer

    def _refusal(self, code: int, path: str, text: str) -> Exception:
        """Return the error for an HTTP status."""
        if code == 404 and "does not exist" in text:
            return KeyError(path)
        if code == 404:
            return RayJobsError(f"{self.address} is not a Ray dashboard: it has no {path}{PORT_HINT}")
        if code in (401, 403):
            reason = "refuses the token" if self.token else "requires a token and none is set here"
            return RayJobsError(f"{self.address} {reason} ({code}): {token_hint()}")
        message = f"{self.address}{path} answered {code}: {text.strip()[-500:]}"
        transient = code in (502, 503, 504) or any(part in text for part in STARTING)
        return _TransientError(message) if transient else RayJobsError(message)


def submit(
    jobs: RayJobs,
    job: Job | list[Job],
    flags: tuple[str, ...] = (),
    runtime_env: dict[str, Any] | None = None,
    grace_s: float = 20,
    log_format: str = "text",
) -> Submission:
    """Submit the values of a job file, of one or several jobs, with paths as the cluster sees them. The id
    depends on the job and OUTPUT, of several jobs the first generate job's, else the last's. A running job is
    joined; one that has ended gets another attempt, which resumes it. flags: of `run`, such as
    --retry-failed. Raises RayJobsError."""
    listed = job if isinstance(job, list) else [job]
    generating = [values for values in listed if values.get("kind") == "generate"]
    output = str([*generating, listed[-1]][0]["output"])
    folder = re.sub(r"[^a-z0-9]+", "-", output.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:24]
    output_prefix = f"{folder or 'job'}-{_digest(output, 8)}-"
    value = listed[0] if len(listed) == 1 else listed
    prefix = f"{output_prefix}{_digest([value, flags], 6)}-"
    statuses = {str(earlier["submission_id"]): earlier["status"] for earlier in jobs.list(output_prefix)}
    active = [name for name, status in statuses.items() if status in ACTIVE]
    for name in (name for name in active if not name.startswith(prefix)):
        hint = f"wait for it, or `context-diffusion stop {name}`"
        raise WrongSubmissionError(f"{output}: another job, {name}, is writing there; {hint}")
    if active:
        return Submission(active[0], True, output)
    attempts = [int(name.rsplit("-", 1)[1]) for name in statuses if name.startswith(prefix)]
    name = f"{prefix}{max(attempts, default=0) + 1}"
    words = ["run", "/dev/stdin", *flags, "--grace", f"{grace_s:g}", "--log-format", log_format]
    environment = dict(runtime_env or {})
    stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(grace_s) + STOP_MARGIN_S)}
    environment["env_vars"] = stop_wait | environment.get("env_vars", {})
    is_new = jobs.submit(name, entrypoint_of(words, value, runtime_env), environment, {"output": output})
    return Submission(name, not is_new, output)


def entrypoint_of(words: list[str], job: Job | list[Job], runtime_env: dict[str, Any] | None = None) -> str:
    """Return a shell command for Ray Jobs that passes a job to a command of the package on stdin. It uses the
    Python of Ray, or of the runtime_env; if that lacks the package, it prints so and ends with 2."""
    python = "p=python" if any(key in (runtime_env or {}) for key in OTHER_PYTHON) else OWN_PYTHON
    stdin = f"printf %s {shlex.quote(json.dumps(job, ensure_ascii=False))}"
    return f'{python}\n{CHECK}\n{stdin} | "$p" -m context_diffusion {shlex.join(words)}'


def last_line(log: str) -> dict[str, Any]:
    """Return a command's result from its log: the last JSON object that is not an event, else {}."""
    objects = (json.loads(line) for line in reversed(log.splitlines()) if line.startswith("{"))
    return next((summary for summary in objects if "event" not in summary), {})


def _digest(value: Any, length: int) -> str:
    """Return a hash. The order of keys counts, since a matrix's order gives the index of its images."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:length]


def exit_code(job: dict[str, Any]) -> int:
    """Return an ended job's exit code; 143 if it was stopped, 75 if its node or cluster was lost."""
    codes = {"SUCCEEDED": 0, "STOPPED": EXIT_STOPPED}
    return codes.get(job["status"], int(job.get("driver_exit_code") or EXIT_LOST))
