"""Reads and writes local disks and object stores with fsspec.

Objects are complete or absent, and only `replace` overwrites them. Transient errors are retried until a
deadline. Knows no manifests, Ray or torch.
"""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import tenacity
from fsspec.core import url_to_fs

from context_diffusion.core.errors import ConfigError, ErrorCode, RowError, StorageError, one_line
from context_diffusion.core.event_log import WaitNotice
from context_diffusion.core.uris import is_local, local_path, normal, protocol
from context_diffusion.storage.atomic_files import create_file, removing_new_folders, replace_file
from context_diffusion.storage.transient_errors import FINAL_ERRNO, NO_CREDENTIALS, is_transient

T = TypeVar("T")
PUT_BYTES = 5 * 2**30  # the chunk size of s3fs: up to here an object is one request, not a multipart upload
# pip extras by protocol
EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}

CREDENTIALS_S = 10.0  # how long missing credentials are retried: the service that provides them may be busy
CREDENTIALS_HINT = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the job's `storage_options` "
    "(`anon: true` for a public bucket)"
)


@dataclass(frozen=True)
class Storage:
    """Reads and writes the files of one job.

    options: fsspec's storage options by protocol; deadline_s: how long one operation is retried, in seconds.
    """

    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    deadline_s: float = 120.0

    def _fs(self, uri: str, **options: Any) -> tuple[Any, str]:
        """Return the fsspec file system of a URI and the path on it. Raises ConfigError."""
        scheme = protocol(uri)
        try:
            return url_to_fs(normal(uri), **self.options.get(scheme, {}), **options)
        except (ImportError, ValueError) as error:
            missing = isinstance(error, ImportError) and scheme in EXTRAS
            hint = f": pip install 'context-diffusion[{EXTRAS[scheme]}]'" if missing else ""
            raise ConfigError(f"{uri}: the protocol {scheme}:// cannot be used: {error}{hint}") from error

    def check(self, uri: str) -> None:
        """Raise ConfigError if the URI's protocol is unknown or its package is missing. Does not connect."""
        self._fs(uri)

    def _try(self, uri: str, action: Callable[[], T]) -> T:
        """Run an action with retries.

        Raises StorageError if the last try fails, ConfigError if credentials are missing. Errors of missing
        or existing files and folders are raised unchanged.
        """
        waits = contextlib.ExitStack()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            stop=self._deadline_passed,
            before_sleep=partial(self._report_waiting, uri, waits),
            reraise=True,
        )
        try:
            with waits:
                return retrying(action)
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            name = type(error).__name__
            if name in NO_CREDENTIALS:
                raise ConfigError(f"{uri}: {name}: {error}; {CREDENTIALS_HINT}") from error
            if isinstance(error, OSError) or is_transient(error):
                raise StorageError(f"{uri}: {name}: {error}") from error
            raise

    def _report_waiting(self, uri: str, waits: contextlib.ExitStack, state: tenacity.RetryCallState) -> None:
        """Report on stderr, from the first failure, what is retried: a wrong endpoint would look like a job
        that hangs."""
        if state.attempt_number == 1 and state.outcome:
            error = state.outcome.exception()
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            message = f"{uri} is retried for up to {self._patience_s(state):.0f} s: {reason}"
            waits.enter_context(WaitNotice(lambda: message, "warning"))

    def _deadline_passed(self, state: tenacity.RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) >= self._patience_s(state)

    def _patience_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        limit_s = CREDENTIALS_S if type(error).__name__ in NO_CREDENTIALS else self.deadline_s
        return min(self.deadline_s, limit_s)

    def read(self, uri: str) -> bytes:
        """Return the bytes of a file. Raises FileNotFoundError, StorageError."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.cat_file(path))

    def read_range(self, uri: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file from `offset` on."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.cat_file(path, start=offset, end=offset + size))

    def read_input(self, uri: str, max_bytes: int, http_client: Any = None) -> bytes:
        """Return the bytes of a row's file.

        http_client: fsspec's `get_client` for an untrusted URI (inputs/safe_http.py). Raises RowError with
        the URI, StorageError if the store cannot be reached.
        """
        guarded = http_client is not None and protocol(uri) in ("http", "https")
        options = {"get_client": http_client} if guarded else {}
        try:
            fs, path = self._fs(uri, **options)
        except ConfigError as error:  # a missing package fails this row, not the job
            raise RowError(ErrorCode.UNREADABLE_FILE, one_line(str(error))) from None
        try:
            return self._read_up_to(uri, fs, path, max_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _missing_file(uri, error) from None
        except ConfigError as error:  # no credentials
            raise RowError(ErrorCode.UNREADABLE_FILE, one_line(str(error))) from None
        except (PermissionError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if isinstance(cause, PermissionError) or getattr(cause, "errno", None) in FINAL_ERRNO:
                raise RowError(ErrorCode.UNREADABLE_FILE, f"{uri} cannot be read: {cause}") from None
            raise

    def _read_up_to(self, uri: str, fs: Any, path: str, max_bytes: int) -> bytes:
        """Return the bytes of a file. Raises RowError if it is a folder or has more than max_bytes."""
        info = self._try(uri, lambda: fs.info(path))
        size = info["size"]
        limit = f"at most {max_bytes} are allowed"
        if info["type"] == "directory":
            raise RowError(ErrorCode.UNREADABLE_FILE, f"{uri} is a folder")
        if (size or 0) > max_bytes:
            raise RowError(ErrorCode.FILE_TOO_LARGE, f"{uri} has {size} bytes, {limit}")
        end = None if size else max_bytes + 1  # a server may give no size: one byte too many is enough
        data = self._try(uri, lambda: fs.cat_file(path, end=end))
        if len(data) > max_bytes:
            raise RowError(ErrorCode.FILE_TOO_LARGE, f"{uri} has over {max_bytes} bytes, {limit}")
        return data

    def parse(self, uri: str, parse: Callable[[BinaryIO], T]) -> T:
        """Return the result of `parse` on a seekable file, which need not read it all. Retries repeat it."""
        fs, path = self._fs(uri)

        def open_and_parse() -> T:
            with fs.open(path, "rb") as file:
                return parse(file)

        return self._try(uri, open_and_parse)

    def open(self, uri: str) -> BinaryIO:
        """Open a seekable file for reading."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.open(path, "rb"))

    def exists(self, uri: str) -> bool:
        """Return whether a file or folder exists."""
        fs, path = self._fs(uri)
        fs.invalidate_cache()
        return self._try(uri, lambda: fs.exists(path))

    def is_folder(self, uri: str) -> bool:
        """Return whether the URI is an existing folder."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.isdir(path))

    def glob(self, pattern: str) -> list[str]:
        """Return the URIs of the files that match a pattern, sorted."""
        fs, path = self._fs(pattern)
        matches = self._try(pattern, lambda: fs.glob(path, detail=True))
        paths = [match for match, info in matches.items() if info["type"] == "file"]
        return sorted(path if is_local(pattern) else fs.unstrip_protocol(path) for path in paths)

    def files(self, folder: str) -> list[str]:
        """Return the URIs of all files below a folder, sorted. `[` and `*` in its name are no pattern."""
        fs, path = self._fs(folder)
        paths = self._try(folder, lambda: fs.find(path))
        return sorted(str(path) if is_local(folder) else fs.unstrip_protocol(path) for path in paths)

    def list(self, folder: str) -> list[str]:
        """Return the names of a folder's entries; an empty list if it does not exist."""
        fs, path = self._fs(folder)
        fs.invalidate_cache()
        try:
            entries = self._try(folder, lambda: fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [str(entry).rsplit("/", 1)[-1] for entry in entries]

    def fingerprint(self, uri: str) -> dict[str, Any]:
        """Return what identifies a version of a file: its size, and its ETag or time of modification."""
        fs, path = self._fs(uri)
        info = self._try(uri, lambda: fs.info(path))
        version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
        return {"bytes": info["size"], "version": str(version)}

    def create(self, uri: str, data: bytes) -> bool:
        """Create an object atomically and return True; return False, and leave it unchanged, if it exists."""
        if is_local(uri):
            return self._try(uri, lambda: create_file(Path(local_path(uri)), data))
        fs, path = self._fs(uri)
        if protocol(uri) in ("s3", "s3a"):
            return self._try(uri, lambda: self._create_s3(fs, path, data))
        if self.exists(uri):
            return False
        self._try(uri, lambda: fs.pipe_file(path, data))
        return True

    def _create_s3(self, fs: Any, path: str, data: bytes) -> bool:
        try:
            fs.pipe_file(path, data, mode="create", chunksize=PUT_BYTES)
        except OSError as error:
            if not isinstance(error, FileExistsError) and error.errno != errno.EINVAL:
                raise
            # 412: the object exists. It may come from an earlier try whose response was lost.
            return bool(fs.cat_file(path) == data)
        return True

    def replace(self, uri: str, data: bytes) -> None:
        """Write an object atomically, replacing an existing one."""
        if is_local(uri):
            self._try(uri, lambda: replace_file(Path(local_path(uri)), data))
            return
        fs, path = self._fs(uri)
        options = {"chunksize": PUT_BYTES} if protocol(uri) == "s3" else {}
        self._try(uri, lambda: fs.pipe_file(path, data, **options))

    def try_writing(self, folder: str) -> bool:
        """Create an object in a folder as a run does, and delete it.

        Returns whether the store refuses to create an object twice. Raises StorageError if the folder cannot
        be written.
        """
        uri = f"{folder}/.probe-{uuid.uuid4().hex}"
        local = is_local(folder)
        try:
            with removing_new_folders(Path(local_path(folder))) if local else contextlib.nullcontext():
                try:
                    return self.create(uri, b"first") and not self.create(uri, b"second")
                finally:
                    self.delete(uri)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {type(error).__name__}: {error}") from error

    def delete(self, uri: str) -> None:
        """Delete a file, if it exists."""
        fs, path = self._fs(uri)
        with contextlib.suppress(FileNotFoundError):
            self._try(uri, lambda: fs.rm_file(path))


def _missing_file(uri: str, error: OSError) -> RowError:
    """Return the error of a row whose file does not exist."""
    if isinstance(
        error.__cause__, RowError
    ):  # from http_client: fsspec raises FileNotFoundError for every error
        return error.__cause__
    quoted = is_local(uri) and unquote(uri) != uri
    hint = f"; percent signs are not decoded in local paths: did you mean {unquote(uri)!r}?" if quoted else ""
    return RowError(ErrorCode.MISSING_FILE, f"{uri} does not exist{hint}")
