"""Parquet files from any storage: what is the file's fault and what the store's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.storage.filesystem import Storage

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


def to_parquet(table: pa.Table, binary: tuple[str, ...] = ()) -> bytes:
    """The bytes of a Parquet file; columns in `binary` hold compressed pictures: no dictionary, no compression."""
    sink = io.BytesIO()
    compression = {name: "NONE" if name.split(".")[0] in binary else "ZSTD" for name in _leaves(table.schema)}
    dictionary = [name for name in compression if compression[name] != "NONE"]
    pq.write_table(table, sink, compression=compression, use_dictionary=dictionary)
    return sink.getvalue()


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the leaf columns, as Parquet names them."""
    sink = io.BytesIO()
    pq.write_metadata(schema, sink)
    parquet = pq.ParquetFile(io.BytesIO(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
