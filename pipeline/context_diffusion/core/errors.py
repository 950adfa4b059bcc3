"""Exceptions with their exit codes, and the error codes of failed rows with their remedies.

    ContextDiffusionError                 exit code
      JobError                            2   the job, manifest or model is invalid
        ConfigError                           the job file
        ManifestError                         the manifest, with the file named
        ModelError                            components or weights
        OutputConflictError                   OUTPUT belongs to another job, manifest or version
      TooManyFailuresError                4   more rows failed than max_failed allows
      ExternalError                       75  interrupted by an external error; the same command resumes it
        StorageError
        ClusterError
      RowError                            -   one invalid row: recorded as failed with its ErrorCode

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
# What each means for OUTPUT, and what to do: a table of jobs/reference/cli.md.
EXITS: dict[int, tuple[str, str]] = {
    EXIT_OK: ("every row has its image", "nothing"),
    EXIT_ROWS_FAILED: (
        "finished; some rows failed and are in data/ with an error code and a message",
        "fix the causes listed under the codes, then `run JOB --retry-failed`",
    ),
    EXIT_JOB: (
        "the job, manifest or model is invalid; the message names the file or key",
        "correct it; `validate JOB` finds such errors before any compute is spent",
    ),
    EXIT_TOO_MANY_FAILED: (
        "more rows failed than `max_failed` allows",
        "see `codes` in summary.json, correct the rows and `run JOB --retry-failed`, or raise `max_failed`",
    ),
    EXIT_EXTERNAL: (
        "interrupted by an external error: storage, cluster or memory",
        "resolve the cause in the message, then rerun the same command to resume",
    ),
    EXIT_INTERRUPTED: ("stopped by Ctrl-C", "rerun the same command to resume"),
    EXIT_TERMINATED: ("stopped by SIGTERM", "rerun the same command to resume"),
    EXIT_UNEXPECTED: (
        "an unexpected error, or `verify` found an error",
        "rerun the same command to resume; if it fails again, report the error with stderr",
    ),
}


class ContextDiffusionError(Exception):
    """Base of all errors raised on purpose. `exit_code` is the exit code of the command line."""

    exit_code = EXIT_UNEXPECTED


class JobError(ContextDiffusionError):
    """The job, its manifest or its model is invalid."""

    exit_code = EXIT_JOB


class ConfigError(JobError):
    """The job file or an option is invalid."""


class ManifestError(JobError):
    """The manifest is invalid; the message names the file."""


class ModelError(JobError):
    """Components or weights of the model are missing or invalid."""


class OutputConflictError(JobError):
    """OUTPUT belongs to another job, manifest or version."""


class TooManyFailuresError(ContextDiffusionError):
    """More rows failed than `max_failed` allows."""

    exit_code = EXIT_TOO_MANY_FAILED


class ExternalError(ContextDiffusionError):
    """The run was interrupted by its environment; the same command resumes it."""

    exit_code = EXIT_EXTERNAL


class StorageError(ExternalError):
    """Storage could not be read or written."""


class ClusterError(ExternalError):
    """The Ray cluster could not be reached, lacks resources, or ended the run."""


MOST_CHARACTERS = 1000  # of a row's message


class ErrorCode(StrEnum):
    """Why a row failed: the values of the column `error_code`."""

    MISSING_FILE = "missing_file"
    UNREADABLE_FILE = "unreadable_file"
    FORBIDDEN_URI = "forbidden_uri"
    FILE_TOO_LARGE = "file_too_large"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    INVALID_REFERENCE = "invalid_reference"
    INVALID_MASK = "invalid_mask"
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


# What to do about each: a table of jobs/reference/errors.md; `validate` prints it too.
REMEDIES: dict[ErrorCode, str] = {
    ErrorCode.MISSING_FILE: "check the path or host: URIs are relative to the folder of the manifest, not "
    "to that of the job file",
    ErrorCode.UNREADABLE_FILE: "grant the process read access: the cluster's identity, AWS_PROFILE, the "
    "mode of the file",
    ErrorCode.FORBIDDEN_URI: "add its prefix to `allow`; private addresses are always forbidden: copy such "
    "images to a bucket",
    ErrorCode.FILE_TOO_LARGE: "raise `limits.max_bytes`, or store a smaller file",
    ErrorCode.NOT_AN_IMAGE: "convert it to JPEG, PNG, WebP, TIFF, BMP, GIF or AVIF; check that the file is "
    "not an HTML error page",
    ErrorCode.TRUNCATED_IMAGE: "download the file again: it is truncated or damaged",
    ErrorCode.TOO_MANY_PIXELS: "raise `limits.max_pixels`, or scale the image down",
    ErrorCode.INVALID_REFERENCE: "enlarge or crop the image to the limits that the message gives",
    ErrorCode.INVALID_MASK: "crop or redraw the mask to the aspect ratio of the output",
    ErrorCode.NO_QUERY: "fill in the cell, or name its column in `columns`",
    ErrorCode.NO_CONTEXT: "give one or more images as a list; in CSV as a JSON list",
    ErrorCode.TOO_MANY_CONTEXTS: "give fewer, or raise `limits.max_contexts` up to what the model supports",
    ErrorCode.UNKNOWN_SCHEDULER: "use one of the names in the message",
    ErrorCode.INVALID_SETTING: "use a value in the range that the message gives",
    ErrorCode.INVALID_ID: "use ids without the path parts `.` and `..`",
    ErrorCode.PROMPT_TOO_LONG: "shorten the prompt, or raise `limits.max_prompt_characters`",
    ErrorCode.ENGINE_CRASH: "run the row alone in Python, `model(...)`: it crashed an engine three times "
    "when run alone",
    ErrorCode.ENGINE_ERROR: "use a smaller guidance_scale or another scheduler, or dtype float32 where the "
    "model overflows",
    ErrorCode.OUT_OF_MEMORY: "use a smaller width and height, a smaller input image, or a machine with "
    "more memory",
}


class RowError(ContextDiffusionError):
    """One row cannot be generated. `code` is stable; the message holds the invalid value, cut if it is
    long."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        self.code = code
        self.message = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}..."
        super().__init__(code, self.message)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def one_line(text: str, most: int = 1000) -> str:
    """Return a message as one line without terminal colours.

    The middle of a long one is cut out, since the reason of a traceback is at its end.
    """
    line = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).split())
    return line if len(line) <= most else f"{line[: most // 3]} ... {line[len(line) - most * 2 // 3 + 5 :]}"


def classify(error: Exception) -> dict[str, Any]:
    """Return the exit code and the one-line message of an exception, also of one that is the cause of
    Ray's."""
    chain: BaseException | None = error
    while chain is not None:
        cause = chain if isinstance(chain, ContextDiffusionError) else getattr(chain, "cause", None)
        if isinstance(cause, ContextDiffusionError):
            return {"exit": cause.exit_code, "error": one_line(str(cause))}
        chain = chain.__cause__ or (cause if isinstance(cause, BaseException) else None)
    package = type(error).__module__.split(".")[0]
    if package == "ray" or isinstance(error, TimeoutError):
        return {"exit": ClusterError.exit_code, "error": one_line(f"{type(error).__name__}: {error}")}
    traceback.print_exception(error)
    return {"exit": EXIT_UNEXPECTED, "error": one_line(f"{type(error).__name__}: {error}")}
