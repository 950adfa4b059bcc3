"""Reads and writes Parquet files on any storage, and separates damaged files from storage errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.storage.filesystem import Storage

T = TypeVar("T")


class NotParquetError(Exception):
    """The file is damaged or is not a Parquet file; reading it again cannot help."""


def read_parquet_file(storage: Storage, uri: str, read: Callable[[pq.ParquetFile], T]) -> T:
    """Return the result of `read`, which may read only parts of the file. Storage errors are retried.

    Raises NotParquetError, StorageError, FileNotFoundError.
    """

    def parse(file: BinaryIO) -> T:
        try:
            return read(pq.ParquetFile(file))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
                raise  # a storage error: those of pyarrow itself have no errno
            raise NotParquetError(str(error)) from error

    return storage.parse(uri, parse)


def to_parquet(table: pa.Table, binary: tuple[str, ...] = ()) -> bytes:
    """Return the bytes of a Parquet file.

    binary: columns of encoded images, which are stored without dictionary and compression.
    """
    sink = io.BytesIO()
    compression = {name: "NONE" if name.split(".")[0] in binary else "ZSTD" for name in _leaves(table.schema)}
    dictionary = [name for name in compression if compression[name] != "NONE"]
    pq.write_table(table, sink, compression=compression, use_dictionary=dictionary)
    return sink.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the leaf columns in Parquet's notation."""
    sink = io.BytesIO()
    pq.write_metadata(schema, sink)
    parquet = pq.ParquetFile(io.BytesIO(sink.getvalue())).schema
    return [parquet.column(number).path for number in range(len(parquet))]
