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
    UNKNOWN_SETTING = "unknown_setting"
    INVALID_SETTING = "invalid_setting"
    INVALID_ID = "invalid_id"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENGINE_CRASH = "engine_crash"
    ENGINE_ERROR = "engine_error"
    OUT_OF_MEMORY = "out_of_memory"


class RowError(ContextDiffusionError):
    """One row cannot be made. `code` is stable and short; the message holds the value that was wrong."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def classify(error: Exception) -> dict[str, Any]:
    """An exception that crossed Ray -> exit code and message: ours travel as the cause of Ray's."""
    chain: BaseException | None = error
    while chain is not None:
        ours = chain if isinstance(chain, ContextDiffusionError) else getattr(chain, "cause", None)
        if isinstance(ours, ContextDiffusionError):
            return {"exit": ours.exit_code, "error": str(ours)}
        chain = chain.__cause__ or (ours if isinstance(ours, BaseException) else None)
    name = type(error).__module__.split(".")[0]
    if name == "ray" or isinstance(error, TimeoutError):
        return {"exit": ClusterError.exit_code, "error": f"{type(error).__name__}: {error}"[:2000]}
    traceback.print_exception(error)
    return {"exit": EXIT_UNEXPECTED, "error": f"{type(error).__name__}: {error}"}
