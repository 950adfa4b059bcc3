"""What may be read and where is written: one object for local disks and object stores (fsspec).

Objects are created whole or not at all, never overwritten but by `replace`. Faults that pass are retried until a
deadline. Knows nothing of rows, Ray or torch.
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
from context_diffusion.core.event_log import Waiting
from context_diffusion.core.uris import is_local, local_path, normal, protocol
from context_diffusion.storage.atomic_files import create_file, removed_again, replace_file

T = TypeVar("T")

ONE_PUT = 5 * 2**30  # a chunk size that keeps s3fs from cutting an object into a multipart upload

EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}  # the package's, by protocol

# What no second try mends.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

# botocore's, by name: it is imported with the first s3:// URL. The service that gives them may be busy for a moment.
NO_CREDENTIALS = {"NoCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}

NO_CREDENTIALS |= (WRONG_CREDENTIALS := {"PartialCredentialsError", "ProfileNotFound", "InvalidConfigError", "SSOTokenLoadError"})

CREDENTIALS_S = 10.0

FINAL_ERRNO = {errno.ENOSPC, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.EDQUOT}


def _passes(error: BaseException) -> bool:
    """Is the fault one that a later try may not meet?"""
    if isinstance(error, FINAL) or (isinstance(error, OSError) and error.errno in FINAL_ERRNO):
        return False
    if type(error).__name__ in WRONG_CREDENTIALS:
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in (
        "botocore",
        "aiohttp",
        "aiobotocore",
    )


@dataclass(frozen=True)
class Storage:
    """options: fsspec's storage options by protocol. deadline_s: how long one operation is tried again."""

    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    deadline_s: float = 120.0

    def _fs(self, uri: str, **more: Any) -> tuple[Any, str]:
        scheme = protocol(uri)
        try:
            return url_to_fs(normal(uri), **self.options.get(scheme, {}), **more)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(scheme)
            hint = f": pip install 'context-diffusion[{extra}]'" if extra and isinstance(error, ImportError) else ""
            raise ConfigError(f"{uri}: the protocol {scheme}:// cannot be used: {error}{hint}") from error

    def check(self, uri: str) -> None:
        """Raises ConfigError where its protocol cannot be used: its package is missing. Connects to nothing."""
        self._fs(uri)

    def _try(self, uri: str, action: Callable[[], T]) -> T:
        """Runs an action with retries; what remains becomes a StorageError, what is final is raised as it is."""
        waits = contextlib.ExitStack()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passes),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            stop=self._is_over,
            before_sleep=partial(self._tell_waiting, uri, waits),
            reraise=True,
        )
        try:
            with waits:
                return retrying(action)
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            if (name := type(error).__name__) in NO_CREDENTIALS:
                hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the job's `storage_options`"
                raise ConfigError(f"{uri}: {name}: {error}; {hint} (`anon: true` for a public bucket)") from error
            if isinstance(error, OSError) or _passes(error):
                raise StorageError(f"{uri}: {type(error).__name__}: {error}") from error
            raise

    def _tell_waiting(self, uri: str, waits: contextlib.ExitStack, state: tenacity.RetryCallState) -> None:
        """Say from the first failure on what is waited for: a wrong endpoint would look like a job that hangs."""
        if state.attempt_number == 1 and state.outcome:
            error = state.outcome.exception()
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            message = f"{uri} is tried again for up to {self._patience_s(state):.0f} s: {reason}"
            waits.enter_context(Waiting(lambda: message, "warning"))

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) >= self._patience_s(state)

    def _patience_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return min(self.deadline_s, CREDENTIALS_S) if type(error).__name__ in NO_CREDENTIALS else self.deadline_s

    def read(self, uri: str) -> bytes:
        """All bytes. Raises FileNotFoundError, StorageError."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.cat_file(path))

    def read_range(self, uri: str, offset: int, size: int) -> bytes:
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.cat_file(path, start=offset, end=offset + size))

    def read_input(self, uri: str, max_bytes: int, http_client: Any = None) -> bytes:
        """The bytes of a row's file. http_client: fsspec's `get_client`, for a URI that is not trusted (inputs/safe_http.py).

        Raises RowError with the URI; StorageError where the store itself is away.
        """
        guarded = http_client is not None and protocol(uri) in ("http", "https")
        try:
            fs, path = self._fs(uri, get_client=http_client) if guarded else self._fs(uri)
        except ConfigError as error:  # a protocol whose package is not installed: this row's failure, not the job's
            raise RowError(ErrorCode.UNREADABLE_FILE, one_line(str(error))) from None
        try:
            size = self._try(uri, lambda: fs.info(path))
            if size["type"] == "directory":
                raise RowError(ErrorCode.UNREADABLE_FILE, f"{uri} is a folder")
            if (size["size"] or 0) > max_bytes:
                raise RowError(ErrorCode.FILE_TOO_LARGE, f"{uri} has {size['size']} bytes, allowed are {max_bytes}")
            # A server that tells no size gets no more than one byte over the limit read of it.
            data = self._try(uri, lambda: fs.cat_file(path, end=None if size["size"] else max_bytes + 1))
            if len(data) > max_bytes:
                raise RowError(ErrorCode.FILE_TOO_LARGE, f"{uri} has over {max_bytes} bytes, which are allowed")
            return data
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error.__cause__, RowError):  # the http_client's: fsspec makes a FileNotFoundError of every error
                raise error.__cause__ from None
            quoted = is_local(uri) and unquote(uri) != uri
            hint = f"; names are not unquoted here: is {unquote(uri)!r} meant?" if quoted else ""
            raise RowError(ErrorCode.MISSING_FILE, f"{uri} does not exist{hint}") from None
        except ConfigError as error:  # no credentials
            raise RowError(ErrorCode.UNREADABLE_FILE, one_line(str(error))) from None
        except (PermissionError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if isinstance(cause, PermissionError) or getattr(cause, "errno", None) in FINAL_ERRNO:
                raise RowError(ErrorCode.UNREADABLE_FILE, f"{uri} cannot be read: {cause}") from None
            raise

    def parse(self, uri: str, parse: Callable[[BinaryIO], T]) -> T:
        """What `parse` makes of a seekable file, of which it need not read all; tried again from the beginning."""
        fs, path = self._fs(uri)

        def opened() -> T:
            with fs.open(path, "rb") as file:
                return parse(file)

        return self._try(uri, opened)

    def open(self, uri: str) -> BinaryIO:
        """A seekable file for reading."""
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.open(path, "rb"))

    def exists(self, uri: str) -> bool:
        fs, path = self._fs(uri)
        fs.invalidate_cache()
        return self._try(uri, lambda: fs.exists(path))

    def is_folder(self, uri: str) -> bool:
        fs, path = self._fs(uri)
        return self._try(uri, lambda: fs.isdir(path))

    def glob(self, pattern: str) -> list[str]:
        """The files that match, sorted, with their scheme."""
        fs, path = self._fs(pattern)
        found = self._try(pattern, lambda: fs.glob(path, detail=True))
        return sorted(fs.unstrip_protocol(p) if not is_local(pattern) else p for p, i in found.items() if i["type"] == "file")

    def files(self, folder: str) -> list[str]:
        """All files below a folder, sorted, with their scheme; whatever signs their names hold."""
        fs, path = self._fs(folder)
        found = self._try(folder, lambda: fs.find(path))
        return sorted(str(p) if is_local(folder) else fs.unstrip_protocol(p) for p in found)

    def list(self, folder: str) -> list[str]:
        """The names in a folder; none where there is no folder."""
        fs, path = self._fs(folder)
        fs.invalidate_cache()
        try:
            return [str(name).rsplit("/", 1)[-1] for name in self._try(folder, lambda: fs.ls(path, detail=False))]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def fingerprint(self, uri: str) -> dict[str, Any]:
        """What tells one version of a file from another: its size and its ETag or time of change."""
        fs, path = self._fs(uri)
        info = self._try(uri, lambda: fs.info(path))
        changed = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
        return {"bytes": info["size"], "version": str(changed)}

    def create(self, uri: str, data: bytes) -> bool:
        """Creates an object, whole or not at all. False where it is there already: the first one stays."""
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
            fs.pipe_file(path, data, mode="create", chunksize=ONE_PUT)
        except FileExistsError:
            return bool(fs.cat_file(path) == data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # 412: it is there. It may be our own, if the answer to an earlier try was lost.
            return bool(fs.cat_file(path) == data)
        return True

    def replace(self, uri: str, data: bytes) -> None:
        """Writes an object, over the one that may be there."""
        if is_local(uri):
            self._try(uri, lambda: replace_file(Path(local_path(uri)), data))
            return
        fs, path = self._fs(uri)
        self._try(
            uri,
            lambda: fs.pipe_file(path, data, chunksize=ONE_PUT) if protocol(uri) == "s3" else fs.pipe_file(path, data),
        )

    def try_writing(self, folder: str) -> bool:
        """Creates an object in a folder as a run does, and takes it away again. -> does the store refuse to create one twice?
        Raises StorageError where it cannot be written."""
        uri = f"{folder}/.probe-{uuid.uuid4().hex}"
        try:
            with removed_again(Path(local_path(folder))) if is_local(folder) else contextlib.nullcontext():
                try:
                    return self.create(uri, b"first") and not self.create(uri, b"second")
                finally:
                    self.delete(uri)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {type(error).__name__}: {error}") from error

    def delete(self, uri: str) -> None:
        fs, path = self._fs(uri)
        with contextlib.suppress(FileNotFoundError):
            self._try(uri, lambda: fs.rm_file(path))
