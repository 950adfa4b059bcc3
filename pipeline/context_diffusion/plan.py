"""Manifest -> shards, once; what OUTPUT belongs to; what is finished and what is left.

plan.json is written last of the plan: it exists = the plan stands, and every later run takes its shards from it.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.config import GenerateJob
from context_diffusion.errors import ManifestError, OutputConflictError
from context_diffusion.manifest import ManifestFile, expand, open_file, parquet_schema, scan_parquet, scan_text
from context_diffusion.model.source import Source, find_model
from context_diffusion.output import Output, to_parquet
from context_diffusion.rows import column_names, row_id
from context_diffusion.schema import CONTEXT, ID, MANIFEST_COLUMNS, QUERY, Shard
from context_diffusion.storage import Storage, normal
from context_diffusion.unique import UniqueIds, name_duplicates

VERSIONED = ("context-diffusion", "torch", "diffusers", "transformers")
SHARD_COLUMNS = ("number", "file", "first_row", "rows", "group", "offset", "size")


@dataclass(frozen=True)
class Plan:
    """What plan.json says. passed: the manifest's columns that we don't know, with their types."""

    files: list[ManifestFile]
    shards_of: list[int]
    rows: int
    rows_per_part: int
    passed: pa.Schema
    model: Source

    @property
    def shards(self) -> int:
        return sum(self.shards_of)


def part_rows(rows: int, rows_per_part: int) -> int:
    """Rows of a shard: as asked, but small manifests are cut into about eight, of four rows at least."""
    return min(rows_per_part, max(4, -(-rows // 8)))


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def open_plan(job: GenerateJob, output: Output, storage: Storage, accept_change: bool = False) -> Plan:
    """The plan of OUTPUT: the one that stands there, if it is this job's, else a new one.

    Raises ManifestError, OutputConflictError.
    """
    if not output.storage.exists(output.plan):
        _write_plan(job, output, storage)
    record = output.read_json(output.plan)
    model = find_model(job.model, record["model"]["commits"])
    _check_same(record, job, model, storage, output, accept_change)
    passed = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["passed"])))
    files = [ManifestFile(f["uri"], f["format"], f["columns"], f["groups"]) for f in record["manifest"]]
    shards_of = [f["shards"] for f in record["manifest"]]
    return Plan(files, shards_of, record["rows"], record["rows_per_part"], passed, model)


def read_shards(output: Output, file: int) -> Iterator[Shard]:
    """The shards of one manifest file."""
    table = pq.read_table(io.BytesIO(output.storage.read(output.shards(file))))
    for batch in table.to_batches(4096):
        columns = [batch.column(name).to_pylist() for name in SHARD_COLUMNS]
        yield from (Shard(*values) for values in zip(*columns, strict=True))


def _write_plan(job: GenerateJob, output: Output, storage: Storage) -> None:
    model = find_model(job.model)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scanned = Scan(job, files, storage)
    size = part_rows(scanned.rows, job.rows_per_part)
    first, records = 0, []
    for number, file in enumerate(files):
        shards = list(scanned.cut(number, size, first))
        first += len(shards)
        data = to_parquet(pa.Table.from_pylist([vars(shard) for shard in shards], _SHARD_SCHEMA))
        output.storage.replace(output.shards(number), data)
        records.append(
            {
                "uri": normal(file.uri),
                "format": file.format,
                "columns": file.columns,
                "groups": file.groups,
                "rows": scanned.rows_of[number],
                "shards": len(shards),
                **storage.fingerprint(file.uri),
            }
        )
    record = {
        "job": job.model_dump(mode="json"),
        "rows": scanned.rows,
        "rows_per_part": size,
        "model": {"name": model.name, "revision": model.revision, "commits": model.parts.revision if model.parts else {}},
        "versions": versions(),
        "manifest": records,
        "passed": base64.b64encode(scanned.passed().serialize()).decode(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Two drivers may plan at once: equal jobs make equal plans, and another job's is found by _check_same.
    output.storage.create(output.plan, json.dumps(record, indent=2).encode())


_SHARD_SCHEMA = pa.schema([(name, pa.int64()) for name in SHARD_COLUMNS])


class Scan:
    """One pass over the manifest: counts, byte offsets, types of passed columns; ids checked for uniqueness."""

    def __init__(self, job: GenerateJob, files: list[ManifestFile], storage: Storage) -> None:
        self.job, self.files, self.storage = job, files, storage
        self.names = column_names(job)
        self.rows_of = [0] * len(files)
        self.bounds = [array("q") for _ in files]  # JSONL, CSV: where each row begins, and the end; 8 bytes a row
        self.types: dict[str, pa.DataType] = {}
        with UniqueIds() as unique:
            for row in chain.from_iterable(self._ids(number) for number in range(len(files))):
                unique.add(row)
            self.rows = unique.count
            repeated = unique.duplicates()
        if not self.rows:
            raise ManifestError(f"{', '.join(job.manifests)}: the manifest has no rows")
        if repeated:
            again = chain.from_iterable(self._ids(number) for number in range(len(files)))
            shown = ", ".join(repr(name) for name in name_duplicates(repeated, again))
            hint = "" if self.has_ids else "; the manifest has no id column, so equal rows have equal ids"
            raise ManifestError(f"{len(repeated)} id(s) stand more than once in the manifest, such as {shown}{hint}")

    def cut(self, number: int, size: int, first: int) -> Iterator[Shard]:
        """The shards of a file; the first one's number is `first`."""
        file, rows = self.files[number], self.rows_of[number]
        if file.format == "parquet":
            for group, count in enumerate(file.groups):
                for begin in range(0, count, size):
                    yield Shard(first, number, begin, min(size, count - begin), group)
                    first += 1
            return
        bounds = self.bounds[number]
        for begin in range(0, rows, size):
            count = min(size, rows - begin)
            yield Shard(first, number, begin, count, 0, bounds[begin], bounds[begin + count] - bounds[begin])
            first += 1

    def passed(self) -> pa.Schema:
        return pa.schema(sorted(self.types.items()))

    def _ids(self, number: int) -> Iterator[str]:
        """The ids of a file's rows; on the way, what else the plan must know of it."""
        file = self.files[number]
        self.rows_of[number], self.bounds[number] = 0, array("q")
        if file.format == "parquet":
            self._check_columns(file.uri, file.columns)
            for field in parquet_schema(file.uri, self.storage):
                self._see(field.name, field.type)
            rows = scan_parquet(file, self.storage, [self.names[ID]] if self.names[ID] in file.columns else None)
            for row in rows:
                self.rows_of[number] += 1
                yield row_id(row, self.names)
            return
        if file.format == "csv":
            self._check_columns(file.uri, file.columns)
        last = 0
        for begin, end, row in scan_text(file, self.storage):
            if file.format == "jsonl" and not self.rows_of[number]:
                self._check_columns(file.uri, list(row))
            for name, value in row.items():
                self._see(name, pa.string() if file.format == "csv" else _json_type(value))
            self.rows_of[number] += 1
            self.bounds[number].append(begin)
            last = end
            yield row_id(row, self.names)
        self.bounds[number].append(last)

    def _check_columns(self, uri: str, columns: list[str]) -> None:
        missing = [self.names[name] for name in (QUERY, CONTEXT) if self.names[name] not in columns]
        missing += [theirs for theirs in self.job.columns.values() if theirs not in columns and theirs not in missing]
        if missing:
            raise ManifestError(
                f"{uri}: the column(s) {', '.join(missing)} are missing; there are {', '.join(columns)}. "
                "`columns:` in the job renames them"
            )
        self.has_ids = self.names[ID] in columns

    def _see(self, name: str, kind: pa.DataType | None) -> None:
        """Notes the type of a column that we don't know; columns of several types become text."""
        if name in {self.names[ours] for ours in MANIFEST_COLUMNS} or kind is None:
            return
        known = self.types.get(name, kind)
        numbers = {pa.int64(), pa.float64()}
        self.types[name] = known if known == kind else pa.float64() if {known, kind} == numbers else pa.string()


def _json_type(value: Any) -> pa.DataType | None:
    """The Arrow type of a JSON value; None for null, text for lists and objects."""
    if value is None:
        return None
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())


def _flat(keys: dict[str, Any]) -> dict[str, Any]:
    """{"settings": {"seed": 1}} -> {"settings.seed": 1}, as `--set` names them."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def _check_same(record: Any, job: GenerateJob, model: Source, storage: Storage, output: Output, accept_change: bool) -> None:
    """Is the plan that stands in OUTPUT this job's, on this manifest, by these versions?"""
    there, ours = _flat(GenerateJob.model_validate(record["job"]).pixel_keys()), _flat(job.pixel_keys())
    changed = [
        f"{key}: {there.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours | there)
        if ours.get(key) != there.get(key)
    ]
    if changed:
        raise OutputConflictError(f"{output.root} holds another job's output ({'; '.join(changed)}); choose another `output:`")
    for file in record["manifest"]:
        now = storage.fingerprint(file["uri"])
        if now != {key: file[key] for key in now}:
            raise OutputConflictError(f"{file['uri']} changed since {output.root} was planned; choose another `output:`")
    if model.revision != record["model"]["revision"]:
        raise OutputConflictError(f"{output.root} was begun with other weights of the model {record['model']['name']!r}")
    differ = [f"{k} {v} there, {versions()[k]} here" for k, v in record["versions"].items() if versions()[k] != v]
    if differ and not accept_change:
        raise OutputConflictError(
            f"{output.root} was begun with other versions ({'; '.join(differ)}): pixels may differ; --accept-change goes on"
        )
