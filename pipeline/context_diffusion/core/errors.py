"""The exceptions and the row failure codes.

    ContextDiffusionError                 exit code
      JobError                            2   the job, manifest or model is wrong: nothing was started
        ConfigError                           the job file
        ManifestError                         the manifest, with the file named
        ModelError                            components or weights
        OutputConflictError                   OUTPUT belongs to another job, manifest or version
      TooManyFailuresError                4   more rows failed than max_failed allows
      ExternalError                       75  the run broke off for a reason outside; the same command resumes it
        StorageError
        ClusterError
      RowError                            -   one bad row: becomes a failed row with its ErrorCode

Knows nothing of the rest of the package.
"""

from __future__ import annotations

import re
import traceback
from enum import StrEnum
from typing import Any

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_JOB = 2
EXIT_ROWS_FAILED = 3
EXIT_TOO_MANY_FAILED = 4
EXIT_EXTERNAL = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# What each says of OUTPUT, and what to do. The README's table.
EXITS: dict[int, tuple[str, str]] = {
    EXIT_OK: ("every row has its image", "nothing"),
    EXIT_ROWS_FAILED: (
        "finished, some rows failed: they are in data/ with code and reason",
        "mend what the codes name (below), then `run JOB --retry-failed`",
    ),
    EXIT_JOB: (
        "the job, manifest or model is wrong: nothing was started, or it stopped there with the file named",
        "correct what the message names; `validate JOB` finds it before anything is paid",
    ),
    EXIT_TOO_MANY_FAILED: (
        "more rows failed than `max_failed` allows",
        "look at `codes` in summary.json, mend the rows and `run JOB --retry-failed`; or raise `max_failed`",
    ),
    EXIT_EXTERNAL: (
        "broken off for a reason outside: storage, cluster, memory",
        "see to what the message names; the same command goes on",
    ),
    EXIT_INTERRUPTED: ("stopped by Ctrl-C", "the same command goes on"),
    EXIT_TERMINATED: ("stopped by SIGTERM", "the same command goes on"),
    EXIT_UNEXPECTED: (
        "an unexpected error; or `verify` found something wrong",
        "the same command goes on; if it ends so again, report it with stderr",
    ),
}


class ContextDiffusionError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = EXIT_UNEXPECTED


class JobError(ContextDiffusionError):
    exit_code = EXIT_JOB


class ConfigError(JobError):
    pass


class ManifestError(JobError):
    pass


class ModelError(JobError):
    pass


class OutputConflictError(JobError):
    pass


class TooManyFailuresError(ContextDiffusionError):
    exit_code = EXIT_TOO_MANY_FAILED


class ExternalError(ContextDiffusionError):
    exit_code = EXIT_EXTERNAL


class StorageError(ExternalError):
    pass


class ClusterError(ExternalError):
    pass


class ErrorCode(StrEnum):
    """Why a row failed: the values of the column `error_code`."""

    MISSING_FILE = "missing_file"
    UNREADABLE_FILE = "unreadable_file"
    FORBIDDEN_URI = "forbidden_uri"
    FILE_TOO_LARGE = "file_too_large"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    NO_QUERY = "no_query"
    NO_CONTEXT = "no_context"
    TOO_MANY_CONTEXTS = "too_many_contexts"
    UNKNOWN_SCHEDULER = "unknown_scheduler"
    INVALID_SETTING = "invalid_setting"
    INVALID_ID = "invalid_id"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_CRASH = "engine_crash"
    ENGINE_ERROR = "engine_error"
    OUT_OF_MEMORY = "out_of_memory"


# What to do about each. The README's table; `validate` tells it too.
REMEDIES: dict[ErrorCode, str] = {
    ErrorCode.MISSING_FILE: "the file or host is not there: URIs are relative to the manifest's own folder, not to the job's",
    ErrorCode.UNREADABLE_FILE: "give the process the right to read it: the cluster's identity, AWS_PROFILE, the file's mode",
    ErrorCode.FORBIDDEN_URI: "add its prefix to `allow`; private addresses stay forbidden: copy such pictures to a bucket",
    ErrorCode.FILE_TOO_LARGE: "raise `limits.max_bytes`, or store the picture smaller",
    ErrorCode.NOT_AN_IMAGE: "convert it to JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF; a web page under a picture's name is none",
    ErrorCode.TRUNCATED_IMAGE: "fetch the file again: its bytes end too early, or are damaged",
    ErrorCode.TOO_MANY_PIXELS: "raise `limits.max_pixels`, or scale the picture down",
    ErrorCode.NO_QUERY: "fill the cell in, or name its column in `columns`",
    ErrorCode.NO_CONTEXT: "give a list of one picture or more; in CSV a JSON list",
    ErrorCode.TOO_MANY_CONTEXTS: "give fewer, or raise `limits.max_contexts` as far as the model goes",
    ErrorCode.UNKNOWN_SCHEDULER: "take a name that the message lists",
    ErrorCode.INVALID_SETTING: "bring the setting into the range that the message names",
    ErrorCode.INVALID_ID: "take ids without `.` and `..` as parts of a path",
    ErrorCode.PROMPT_TOO_LONG: "shorten the prompt, or raise `limits.max_prompt_characters`",
    ErrorCode.ENGINE_CRASH: "make the row alone by `model(...)`: an engine died three times with nothing else in it",
    ErrorCode.ENGINE_ERROR: "take a smaller guidance_scale or another scheduler; float32 where the model's dtype overflows",
    ErrorCode.OUT_OF_MEMORY: "take a smaller width and height or picture, or a machine with more memory",
}


class RowError(ContextDiffusionError):
    """One row cannot be made. `code` is stable and short; the message holds the value that was wrong."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def one_line(text: str, most: int = 1000) -> str:
    """A message as one line without a terminal's colours; of a long one the middle is cut, for a traceback's reason stands at
    its end."""
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).split())
    return line if len(line) <= most else f"{line[: most // 3]} ... {line[len(line) - most * 2 // 3 + 5 :]}"


def classify(error: Exception) -> dict[str, Any]:
    """An exception that crossed Ray -> exit code and message, one line: ours travel as the cause of Ray's."""
    chain: BaseException | None = error
    while chain is not None:
        ours = chain if isinstance(chain, ContextDiffusionError) else getattr(chain, "cause", None)
        if isinstance(ours, ContextDiffusionError):
            return {"exit": ours.exit_code, "error": one_line(str(ours))}
        chain = chain.__cause__ or (ours if isinstance(ours, BaseException) else None)
    name = type(error).__module__.split(".")[0]
    if name == "ray" or isinstance(error, TimeoutError):
        return {"exit": ClusterError.exit_code, "error": one_line(f"{type(error).__name__}: {error}")}
    traceback.print_exception(error)
    return {"exit": EXIT_UNEXPECTED, "error": one_line(f"{type(error).__name__}: {error}")}
