"""Decides which errors of disks and stores are transient and worth a retry. Knows exceptions only."""

from __future__ import annotations

import errno

# Errors that a retry cannot fix.
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNO = {errno.ENOSPC, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.EDQUOT}

# Exceptions of botocore by name, since botocore is imported with the first s3:// URL only.
WRONG_CREDENTIALS = {"PartialCredentialsError", "ProfileNotFound", "InvalidConfigError", "SSOTokenLoadError"}
NO_CREDENTIALS = {"NoCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", *WRONG_CREDENTIALS}


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, FINAL_ERRORS) or (isinstance(error, OSError) and error.errno in FINAL_ERRNO):
        return False
    if type(error).__name__ in WRONG_CREDENTIALS:
        return False
    package = type(error).__module__.split(".")[0]
    return isinstance(error, OSError | TimeoutError) or package in ("botocore", "aiohttp", "aiobotocore")
