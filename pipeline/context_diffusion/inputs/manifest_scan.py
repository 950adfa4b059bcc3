"""What a plan must know of a manifest, found in one pass over it. Rows are read and forgotten: memory stays flat."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import ManifestError, OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import CONTEXT, ID, MANIFEST_COLUMNS, QUERY
from context_diffusion.core.settings import probable
from context_diffusion.inputs.manifest_files import ManifestFile, parquet_schema, partitions, scan_parquet, scan_text
from context_diffusion.inputs.rows import column_names, given_id, row_id, storage_type
from context_diffusion.inputs.unique_ids import UniqueIds, name_duplicates
from context_diffusion.storage.filesystem import Storage


class Scan:
    """One pass over the manifest: counts, byte offsets, types of passed columns; ids checked for uniqueness.

    digests: of each file's rows, as far as a scan sees them: a text file's whole rows and where they begin, the ids of a
    Parquet file. marks: rows of each file after which `marked` keeps the digest too: has it only grown since? planned: the ids
    that a file's rows were planned with, None where a row has none yet: a derived one stays, a given one must be equal.
    """

    def __init__(
        self,
        job: GenerateJob,
        files: list[ManifestFile],
        storage: Storage,
        marks: Sequence[int] = (),
        planned: Callable[[int], Iterator[str | None]] | None = None,
    ) -> None:
        self.job, self.files, self.storage, self.planned = job, files, storage, planned
        self.names = column_names(job.columns)
        self.marks = [*marks, *[0] * (len(files) - len(marks))]
        self.digests, self.marked = [""] * len(files), [""] * len(files)
        self.rows_of = [0] * len(files)
        self.bounds = [array("q") for _ in files]  # JSONL, CSV: where each row begins, and the end; 8 bytes a row
        self.types: dict[str, pa.DataType] = {}
        self.declared: dict[str, str | None] = {}  # the Parquet file that a column was first seen in
        self.ours = {self.names[name] for name in MANIFEST_COLUMNS}
        with UniqueIds() as unique:
            for row in chain.from_iterable(self._ids(number, unique) for number in range(len(files))):
                unique.add(row)
            self.rows = sum(self.rows_of)
            repeated = unique.duplicates()
        if not self.rows:
            raise ManifestError(f"{', '.join(job.manifests)}: the manifest has no rows")
        if repeated:
            named = (
                (name, f"row {count} of {files[number].uri}")
                for number in range(len(files))
                for count, name in enumerate(self._ids(number), 1)
            )
            shown = "; ".join(f"{name!r}: {' and '.join(places)}" for name, places in name_duplicates(repeated, named).items())
            hint = "" if self.has_ids else "; the manifest has no id column, so equal rows have equal ids"
            if planned:
                raise OutputConflictError(
                    f"{len(repeated)} row(s) of the manifest say what others said when it was planned: rows were moved, added in "
                    "between or removed, or are equal now; each must stay in its place"
                )
            raise ManifestError(f"{len(repeated)} duplicate id(s) in the manifest, such as {shown}{hint}")

    def cut(self, number: int, size: int, first: int, done: int = 0) -> Iterator[Shard]:
        """The shards of a file from its row `done` on; the first one's number is `first`."""
        file, rows = self.files[number], self.rows_of[number]
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

    def passed(self) -> pa.Schema:
        return pa.schema(sorted(self.types.items()))

    def _ids(self, number: int, changed: UniqueIds | None = None) -> Iterator[str]:
        """The ids of a file's rows; on the way, what else the plan must know of it. changed: takes the ids that rows would
        have now where they keep another one: two that are equal are rows that moved."""
        digest = hashlib.blake2b(digest_size=16)
        planned = self.planned(number) if self.planned else repeat(None)
        for count, (row, given, seen) in enumerate(self._rows(number), 1):
            digest.update(seen.encode("utf-8", "surrogatepass"))
            if count == self.marks[number]:
                self.marked[number] = digest.hexdigest()
            before = next(planned, None)
            if given and before is not None and before != row:
                raise OutputConflictError(
                    f"row {count} of {self.files[number].uri} has the id {row!r}, and had {before!r} when it was "
                    "planned: rows are matched by their place, so none may be moved, added in between or removed"
                )
            if changed and before is not None and before != row:
                changed.add(row)
            yield before or row
        self.digests[number] = digest.hexdigest()

    def _rows(self, number: int) -> Iterator[tuple[str, bool, str]]:
        """Each row's id, whether the row itself gives it, and what the digest takes of it."""
        file = self.files[number]
        folders = [name for name in partitions(file.uri) if name not in file.columns]
        self.rows_of[number], self.bounds[number] = 0, array("q")
        if file.format == "parquet":
            self._check_columns(file.uri, [*file.columns, *folders])
            for name in folders:
                self._see(name, pa.string(), file.uri)
            for field in parquet_schema(file.uri, self.storage):
                self._see(field.name, storage_type(field.type), file.uri)
            rows = scan_parquet(file, self.storage, [self.names[ID]] if self.names[ID] in file.columns else None)
            for row in rows:
                self.rows_of[number] += 1
                yield (name := row_id(row, self.names)), given_id(row, self.names) is not None, f"{name}\n"
            return
        if file.format == "csv":
            self._check_columns(file.uri, [*file.columns, *folders])
        last, keys = 0, dict[str, None]()  # a JSONL row may lack what is null
        for begin, end, row in scan_text(file, self.storage):
            keys |= dict.fromkeys(row)
            for name, value in row.items():
                self._see(name, pa.string() if file.format == "csv" else _json_type(value))
            self.rows_of[number] += 1
            self.bounds[number].append(begin)
            last = end
            yield row_id(row, self.names), given_id(row, self.names) is not None, f"{begin} {row}\n"
        self.bounds[number].append(last)
        if file.format == "jsonl" and self.rows_of[number]:
            self._check_columns(file.uri, list(keys))

    def _check_columns(self, uri: str, columns: list[str]) -> None:
        missing = [self.names[name] for name in (QUERY, CONTEXT) if self.names[name] not in columns]
        missing += [theirs for theirs in self.job.columns.values() if theirs not in columns and theirs not in missing]
        if missing:
            raise ManifestError(
                f"{uri}: the column(s) {', '.join(missing)} are missing; there are {', '.join(columns)}. "
                "`columns:` in the job renames them"
            )
        self.has_ids = self.names[ID] in columns

    def _see(self, name: str, kind: pa.DataType | None, uri: str | None = None) -> None:
        """Note the type of a column that we don't know. uri: the Parquet file that declares it. Types that differ are widened,
        and where a text file has a part in it they become text. Raises ManifestError for Parquet files that don't go together,
        and for bytes, which are no text."""
        if name in self.ours or kind is None:
            return
        known = self.types.setdefault(name, kind)
        first = self.declared.setdefault(name, uri)
        if known == kind:
            return
        binary = any(map(pa.types.is_binary, (known, kind)))
        try:
            if not (uri and first) and (binary or pa.types.is_boolean(known) or pa.types.is_boolean(kind)):
                raise pa.ArrowTypeError("text files hold no bytes, and write no booleans as numbers")
            schemas = [pa.schema([(name, one)]) for one in (known, kind)]
            self.types[name] = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
        except pa.ArrowException:
            if binary or (uri and first):
                raise ManifestError(
                    f"the column {name!r} is {known} in {first or 'a text file'} and {kind} in {uri or 'a text file'}: "
                    "write it with one type"
                ) from None
            self.types[name] = pa.string()


def column_warnings(unknown: Iterable[str]) -> list[str]:
    """A line for each unknown column of a manifest that was probably meant as one of ours."""
    pairs = ((name, probable(name, MANIFEST_COLUMNS)) for name in unknown)
    return [
        f"the column {name!r} is copied to the output and changes no image: was {ours!r} meant? "
        f"`columns: {{{ours}: {name}}}` in the job reads it so"
        for name, ours in pairs
        if ours
    ]


def _json_type(value: Any) -> pa.DataType | None:
    """The Arrow type of a JSON value; None for null, text for lists and objects."""
    if value is None:
        return None
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())
