"""Scans a manifest once for what a plan needs. Rows are not stored, so memory use is constant."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NoReturn

import pyarrow as pa

from context_diffusion.core.errors import ManifestError, OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import CONTEXT, ID, MANIFEST_COLUMNS, QUERY
from context_diffusion.core.settings import probable
from context_diffusion.inputs.manifest_files import (
    ManifestFile,
    parquet_schema,
    partitions,
    scan_parquet,
    scan_text,
)
from context_diffusion.inputs.rows import column_names, given_id, row_id, storage_type
from context_diffusion.inputs.unique_ids import UniqueIds, name_duplicates
from context_diffusion.storage.filesystem import Storage


class Scan:
    """Scans a manifest: counts, byte offsets, types of unknown columns, uniqueness of ids.

    digests: of the rows of each file: whole rows and their offsets in text files, ids in Parquet files.
    marks: a number of rows of each file, after which `marked` stores the digest, to tell whether the file
    has only grown. planned: the ids with which a file's rows were planned, None for rows without one: derived
    ids are kept, given ids must be equal. Raises ManifestError, OutputConflictError.
    """

    def __init__(
        self,
        job: GenerateJob,
        files: list[ManifestFile],
        storage: Storage,
        marks: Sequence[int] = (),
        planned: Callable[[int], Iterator[str | None]] | None = None,
    ) -> None:
        self.job = job
        self.files = files
        self.storage = storage
        self.planned = planned
        self.names = column_names(job.columns)
        self.marks = [*marks, *[0] * (len(files) - len(marks))]
        self.digests = [""] * len(files)
        self.marked = [""] * len(files)
        self.rows_of = [0] * len(files)
        # JSONL, CSV: the begin of each row, and the end; 8 bytes per row
        self.bounds = [array("q") for _ in files]
        self.keys: list[list[str]] = [[] for _ in files]  # known columns that rows of a JSONL file have
        self.types: dict[str, pa.DataType] = {}
        self.declared: dict[str, str | None] = {}  # the Parquet file in which a column was first seen
        self.known_columns = {self.names[name] for name in MANIFEST_COLUMNS}
        with UniqueIds() as unique:
            for identifier in chain.from_iterable(self._ids(number, unique) for number in range(len(files))):
                unique.add(identifier)
            self.rows = sum(self.rows_of)
            duplicates = unique.duplicates()
        if not self.rows:
            raise ManifestError(f"{', '.join(job.manifests)}: the manifest has no rows")
        if duplicates:
            self._raise_duplicates(duplicates)

    def _raise_duplicates(self, duplicates: set[bytes]) -> NoReturn:
        """Raise ManifestError with the first duplicate ids, or OutputConflictError if there is a plan."""
        if self.planned:
            raise OutputConflictError(
                f"{len(duplicates)} row(s) of the manifest have the content of other rows of the plan or are "
                "equal now: rows must not be moved, inserted or removed"
            )
        ids = (
            (identifier, f"row {count} of {file.uri}")
            for number, file in enumerate(self.files)
            for count, identifier in enumerate(self._ids(number), 1)
        )
        places_by_id = name_duplicates(duplicates, ids)
        examples = "; ".join(
            f"{identifier!r}: {' and '.join(places)}" for identifier, places in places_by_id.items()
        )
        hint = "" if self.has_ids else "; the manifest has no id column, so equal rows have equal ids"
        raise ManifestError(f"{len(duplicates)} duplicate id(s) in the manifest, such as {examples}{hint}")

    def cut(self, number: int, size: int, first: int, done: int = 0) -> Iterator[Shard]:
        """Cut a file into shards of `size` rows, from its row `done` on. first: the first shard's number."""
        file = self.files[number]
        rows = self.rows_of[number]
        if file.format == "parquet":
            before = 0
            for group, count in enumerate(file.groups):
                for begin in range(min(max(done - before, 0), count), count, size):
                    yield Shard(first, number, begin, min(size, count - begin), group)
                    first += 1
                before += count
            return
        bounds = self.bounds[number]
        for begin in range(done, rows, size):
            count = min(size, rows - begin)
            yield Shard(first, number, begin, count, 0, bounds[begin], bounds[begin + count] - bounds[begin])
            first += 1

    def has_column(self, name: str) -> bool:
        """Return whether any file has a known column."""
        columns = ([*file.columns, *keys] for file, keys in zip(self.files, self.keys, strict=True))
        return any(self.names[name] in known for known in columns)

    def passed(self) -> pa.Schema:
        """Return the schema of the unknown columns, which are copied to the output."""
        return pa.schema(sorted(self.types.items()))

    def _ids(self, number: int, changed: UniqueIds | None = None) -> Iterator[str]:
        """Yield the ids of a file's rows, and note what the plan needs on the way.

        changed: collects the new derived ids of rows that keep their planned id; equal ones are moved rows.
        """
        digest = hashlib.blake2b(digest_size=16)
        planned = self.planned(number) if self.planned else repeat(None)
        for count, (identifier, given, text) in enumerate(self._rows(number), 1):
            digest.update(text.encode("utf-8", "surrogatepass"))
            if count == self.marks[number]:
                self.marked[number] = digest.hexdigest()
            planned_id = next(planned, None)
            differs = planned_id is not None and planned_id != identifier
            if given and differs:
                raise OutputConflictError(
                    f"row {count} of {self.files[number].uri} has the id {identifier!r}, and had "
                    f"{planned_id!r} when it was planned: rows are matched by position, so none may be "
                    "moved, inserted or removed"
                )
            if changed and differs:
                changed.add(identifier)
            yield planned_id or identifier
        self.digests[number] = digest.hexdigest()

    def _rows(self, number: int) -> Iterator[tuple[str, bool, str]]:
        """Yield each row's id, whether its own column gives it, and the text that the digest covers."""
        file = self.files[number]
        folders = [name for name in partitions(file.uri) if name not in file.columns]
        self.rows_of[number] = 0
        self.bounds[number] = array("q")
        if file.format == "parquet":
            self._check_columns(file.uri, [*file.columns, *folders])
            for name in folders:
                self._see(name, pa.string(), file.uri)
            for field in parquet_schema(file.uri, self.storage):
                self._see(field.name, storage_type(field.type), file.uri)
            rows = scan_parquet(
                file, self.storage, [self.names[ID]] if self.names[ID] in file.columns else None
            )
            for row in rows:
                self.rows_of[number] += 1
                identifier = row_id(row, self.names)
                yield identifier, given_id(row, self.names) is not None, f"{identifier}\n"
            return
        if file.format == "csv":
            self._check_columns(file.uri, [*file.columns, *folders])
        last = 0
        keys = dict[str, None]()  # of all rows, since a JSONL row may omit a key whose value is null
        for begin, end, row in scan_text(file, self.storage):
            keys |= dict.fromkeys(row)
            for name, value in row.items():
                self._see(name, pa.string() if file.format == "csv" else _json_type(value))
            self.rows_of[number] += 1
            self.bounds[number].append(begin)
            last = end
            yield row_id(row, self.names), given_id(row, self.names) is not None, f"{begin} {row}\n"
        self.bounds[number].append(last)
        if file.format == "jsonl":
            self.keys[number] = [name for name in keys if name in self.known_columns]
        if file.format == "jsonl" and self.rows_of[number]:
            self._check_columns(file.uri, list(keys))

    def _check_columns(self, uri: str, columns: list[str]) -> None:
        missing = [self.names[name] for name in (QUERY, CONTEXT) if self.names[name] not in columns]
        missing += [name for name in self.job.columns.values() if name not in columns and name not in missing]
        if missing:
            raise ManifestError(
                f"{uri}: the column(s) {', '.join(missing)} are missing; there are {', '.join(columns)}. "
                "If they have other names, set `columns:` in the job"
            )
        self.has_ids = self.names[ID] in columns

    def _see(self, name: str, kind: pa.DataType | None, uri: str | None = None) -> None:
        """Note the type of an unknown column. uri: the Parquet file that declares it.

        Different types are widened, or become text if a text file has the column. Raises ManifestError for
        Parquet files that have no common type, and for bytes in one file and text in another.
        """
        if name in self.known_columns or kind is None:
            return
        known = self.types.setdefault(name, kind)
        first = self.declared.setdefault(name, uri)
        if known == kind:
            return
        binary = any(map(pa.types.is_binary, (known, kind)))
        try:
            if not (uri and first) and (binary or pa.types.is_boolean(known) or pa.types.is_boolean(kind)):
                raise pa.ArrowTypeError("text files have no bytes, and booleans are not numbers")
            schemas = [pa.schema([(name, column_type)]) for column_type in (known, kind)]
            self.types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
        except pa.ArrowException:
            if binary or (uri and first):
                raise ManifestError(
                    f"the column {name!r} is {known} in {first or 'a text file'} "
                    f"and {kind} in {uri or 'a text file'}: write it with the same type in all files"
                ) from None
            self.types[name] = pa.string()


def column_warnings(unknown: Iterable[str]) -> list[str]:
    """Warn about each unknown column of a manifest whose name is close to a known one."""
    pairs = ((name, probable(name, MANIFEST_COLUMNS)) for name in unknown)
    return [
        f"unknown column {name!r} is copied to the output and not used; if it means {known!r}, set "
        f"`columns: {{{known}: {name}}}` in the job"
        for name, known in pairs
        if known
    ]


def _json_type(value: Any) -> pa.DataType | None:
    """Return the Arrow type of a JSON value; None for null, text for lists and objects."""
    if value is None:
        return None
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())
