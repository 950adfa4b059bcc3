"""Which protocols the pictures of a manifest's rows are named by, over all rows, and which of them lack their
package here.

Reads the columns that name pictures, of a Parquet file these alone and no bytes in them. Knows no pixels and
opens no store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from context_diffusion.core.errors import ConfigError, RowError, one_line
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.schema import CONTEXT, CONTROL_IMAGE, QUERY
from context_diffusion.core.uris import protocol
from context_diffusion.inputs.image_sources import as_sources
from context_diffusion.inputs.manifest_files import ManifestFile, Row, scan_text
from context_diffusion.inputs.rows import column_names
from context_diffusion.inputs.url_policy import PROTOCOLS
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import read_parquet_file

NAMED = r'(?:^|")(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://'  # a URI, or the first of a JSON list


@dataclass
class Lacking:
    """A protocol that cannot be used here. rows: how many name it; why: what is missing, at the first URI of
    it."""

    rows: int
    why: str


def lacking(job: GenerateJob, files: list[ManifestFile], storage: Storage) -> tuple[dict[str, Lacking], int]:
    """By protocol, those that rows may read and that cannot be used for want of a package; and how many rows
    name one of them. Raises ManifestError."""
    found: dict[str, Lacking] = {}
    total, names = 0, column_names(job.columns)
    for file in files:
        for schemes in _schemes(file, [names[name] for name in (QUERY, CONTEXT, CONTROL_IMAGE)], storage):
            failing = set[int]()
            for scheme, (rows, uri) in schemes.items():
                if scheme not in found and scheme in PROTOCOLS and (why := _why_not(uri, storage)):
                    found[scheme] = Lacking(0, why)
                if scheme in found:
                    found[scheme].rows += len(rows)
                    failing |= rows
            total += len(failing)
    return found, total


def _why_not(uri: str, storage: Storage) -> str | None:
    try:
        storage.check(uri)
    except ConfigError as error:
        return one_line(str(error))
    return None


Schemes = dict[str, tuple[set[int], str]]  # by protocol: the places of rows, and a URI of them


def _schemes(file: ManifestFile, columns: list[str], storage: Storage) -> Iterator[Schemes]:
    """Of a text file's rows one by one, of a Parquet file's by row group."""
    if file.format != "parquet":
        yield from (_of_row(row, columns) for *_, row in scan_text(file, storage))
        return
    for group in range(len(file.groups)):
        yield _of_table(read_parquet_file(storage, file.uri, partial(_paths, group=group, columns=columns)))


def _of_row(row: Row, columns: list[str]) -> Schemes:
    uris: list[str] = []
    for name in columns:
        with suppress(RowError):  # the row's own failure
            uris += [
                str(source["path"]) for source in as_sources(row.get(name), "") if source["bytes"] is None
            ]
    return {protocol(uri): ({0}, uri) for uri in reversed(uris)}


def _paths(opened: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    """What may hold URIs of these columns: text, not pictures' bytes."""
    wanted = []
    for number in range(len(opened.schema)):
        column = opened.schema.column(number)
        if column.path.split(".")[0] in columns and str(column.logical_type) == "String":
            wanted.append(column.path)
    return opened.read_row_group(group, wanted)


def _of_table(table: pa.Table) -> Schemes:
    found: Schemes = {}
    for column in table.columns:
        texts, places = _texts(column.combine_chunks())
        schemes = pc.utf8_lower(pc.struct_field(pc.extract_regex(texts, NAMED), "scheme"))
        for scheme in pc.unique(schemes.drop_null()).to_pylist():
            where = np.flatnonzero(
                pc.fill_null(pc.equal(schemes, scheme), False).to_numpy(zero_copy_only=False)
            )
            rows, _ = found.setdefault(scheme, (set(), texts[int(where[0])].as_py().lstrip('[" ')))
            rows.update(places[where].tolist())
    return found


def _texts(array: Any) -> tuple[Any, NDArray[np.int64]]:
    """A column of texts, {path} structs or lists of them -> the texts, and the row of each."""
    places = np.arange(len(array))
    while not pa.types.is_string(array.type):
        if isinstance(array.type, pa.BaseExtensionType):
            array = array.storage
        elif pa.types.is_struct(array.type):
            array = pc.struct_field(array, 0)
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            places, array = places[pc.list_parent_indices(array).to_numpy()], pc.list_flatten(array)
        # other kinds of lists
        elif getattr(array.type, "value_field", None) and not pa.types.is_dictionary(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        else:
            array = array.cast(pa.string())
    return array, places
