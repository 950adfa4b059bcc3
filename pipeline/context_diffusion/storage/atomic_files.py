"""Files of a local disk, made whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def create_file(path: Path, data: bytes) -> bool:
    """False where it is there already. A file without a name is filled, then linked to its name: a kill at any moment
    leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            handle = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o644, dir_fd=folder)
        except (OSError, AttributeError):  # a file system or a system that has no nameless files
            return _create_by_temporary(path, data)
        try:
            _write_all(handle, data)
            # src_dir_fd makes Python call linkat, which follows the link in /proc; plain link() does not.
            os.link(f"/proc/self/fd/{handle}", path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            return False
        finally:
            os.close(handle)
    finally:
        os.close(folder)
    return True


def _create_by_temporary(path: Path, data: bytes) -> bool:
    """Where there are no nameless files: a temporary one, linked; without hard links, the name is claimed first."""
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
    """Writes a file, over the one that may be there."""
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
def removed_again(folder: Path) -> Iterator[None]:
    """Folders that come to be on the way to this one are removed at the end, where they are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)
