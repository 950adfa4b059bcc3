"""Parquet files from any storage: what is the file's fault and what the store's."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.storage import Storage

T = TypeVar("T")


class NotParquetError(Exception):
    """The file is damaged, or none of this kind: no second try mends it."""


def read_parquet_file(storage: Storage, uri: str, read: Callable[[pq.ParquetFile], T]) -> T:
    """What `read` makes of the file, of which it need not read all; tried again where the store failed. Raises
    NotParquetError, StorageError, FileNotFoundError."""

    def parse(file: BinaryIO) -> T:
        try:
            return read(pq.ParquetFile(file))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
                raise  # the store's: pyarrow's own have no number
            raise NotParquetError(str(error)) from error

    return storage.parse(uri, parse)
