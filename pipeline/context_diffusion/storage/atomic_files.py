"""Writes files of a local disk atomically: a file is complete or absent, even if the process is killed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def create_file(path: Path, data: bytes) -> bool:
    """Create a file and return True, or return False if it exists.

    The bytes are written to a file without a name, which is then linked to its name: if the process is
    killed, no file is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            handle = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o644, dir_fd=folder)
        except (OSError, AttributeError):  # this file system or operating system has no unnamed files
            return _create_by_temporary(path, data)
        try:
            _write_all(handle, data)
            # src_dir_fd makes Python call linkat, which follows the link in /proc; plain link() does not.
            unnamed = f"/proc/self/fd/{handle}"
            os.link(unnamed, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            return False
        finally:
            os.close(handle)
    finally:
        os.close(folder)
    return True


def _create_by_temporary(path: Path, data: bytes) -> bool:
    """Create a file as create_file does, by linking a temporary file to its name.

    On file systems without hard links, an empty file is created under the name first and then replaced.
    """
    handle, temporary = tempfile.mkstemp(prefix=".creating-", dir=path.parent)
    try:
        _write_all(handle, data)
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, path)
        except PermissionError:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            os.replace(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.close(handle)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically, replacing an existing one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".replacing-", dir=path.parent)
    try:
        _write_all(handle, data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def removing_new_folders(folder: Path) -> Iterator[None]:
    """Remove at the end those of `folder` and its parents that did not exist before, if they are empty."""
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new_folders:
            with contextlib.suppress(OSError):
                path.rmdir()


def _write_all(handle: int, data: bytes) -> None:
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(handle, remaining) :]
    os.fsync(handle)
