"""A plan that is changed: `--extend` for a manifest that grew, `--retry-failed` for one whose rows were corrected.

In both, the shards that stand keep their numbers and rows, since the parts in data/ are named by them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa

from context_diffusion.config import GenerateJob
from context_diffusion.errors import OutputConflictError
from context_diffusion.manifest import ManifestFile, expand, open_file
from context_diffusion.output import Output
from context_diffusion.scan import Scan
from context_diffusion.schema import Shard
from context_diffusion.shards import file_record, read_shards, write_shards
from context_diffusion.storage import Storage, normal


def extend(record: Any, job: GenerateJob, output: Output, storage: Storage) -> Any:
    """Add the shards of what is new to the plan. _SUCCESS goes first and plan.json is changed last, so a run that is broken
    off in between is extended by the next. Returns the new record. Raises OutputConflictError."""
    old = record["manifest"]
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scanned = Scan(job, files, storage, [file["rows"] for file in old])
    _check_grown(old, scanned)
    output.storage.delete(output.success)
    first, records = sum(file["shards"] for file in old), []
    for number in range(len(files)):
        known = list(read_shards(output, number))[: old[number]["shards"]] if number < len(old) else []
        new = list(scanned.cut(number, record["rows_per_part"], first, old[number]["rows"] if known else 0))
        first += len(new)
        if new:
            write_shards(output, number, [*known, *new])
        records.append(file_record(scanned, number, len(known) + len(new)))
    record |= {"job": job.model_dump(mode="json"), "rows": scanned.rows, "manifest": records}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def correct(record: Any, job: GenerateJob, output: Output, storage: Storage, passed: pa.Schema) -> Any:
    """Let the plan take the manifest as it is now, with the same rows in the same places: what they say may be other.
    passed: the columns that the parts in data/ have from the manifest, with their types. Returns the new record.

    Raises OutputConflictError where rows were added, removed or moved, as far as their ids and numbers tell.
    """
    old = record["manifest"]
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    if [normal(file.uri) for file in files] != [file["uri"] for file in old]:
        raise OutputConflictError("--retry-failed: the manifest has other files than the plan; the rows must stay where they are")
    made = output.finished()
    scanned = Scan(job, files, storage, planned=lambda number: _planned_ids(output, number, made))
    for file, rows in zip(old, scanned.rows_of, strict=True):
        if rows != file["rows"]:
            raise OutputConflictError(
                f"--retry-failed: {file['uri']} had {file['rows']} rows and has {rows}; correct its cells, "
                "but add no rows (`--extend` does that in a run of its own) and remove none"
            )
    _check_types(passed, scanned)
    shards = [[_moved(s, file, old[s.file]["groups"], scanned) for s in read_shards(output, n)] for n, file in enumerate(files)]
    output.storage.delete(output.success)
    # Until the last write the plan fits no version of the manifest: were this broken off, the same command does it again.
    unfinished = [file | {"version": ""} for file in old]
    output.storage.replace(output.plan, json.dumps(record | {"manifest": unfinished}, indent=2).encode())
    for number, moved in enumerate(shards):
        write_shards(output, number, moved)
    records = [file_record(scanned, number, len(moved)) for number, moved in enumerate(shards)]
    record |= {"job": job.model_dump(mode="json"), "manifest": records}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def _planned_ids(output: Output, number: int, made: set[int]) -> Iterator[str | None]:
    """The ids of a file's rows as its parts in data/ have them; None for rows that were not made yet."""
    for shard in read_shards(output, number):
        yield from output.ids(shard.number) if shard.number in made else [None] * shard.rows


def _moved(shard: Shard, file: ManifestFile, old_groups: list[int], scanned: Scan) -> Shard:
    """A shard with the place where its rows are now. Raises OutputConflictError where a Parquet file was written with row
    groups that cut the shard."""
    if file.format != "parquet":
        bounds = scanned.bounds[shard.file]
        begin = bounds[shard.first_row]
        return replace(shard, offset=begin, size=bounds[shard.first_row + shard.rows] - begin)
    row = sum(old_groups[: shard.group]) + shard.first_row
    begins = [end - rows for end, rows in zip(accumulate(file.groups), file.groups, strict=True)]
    group = bisect_right(begins, row) - 1  # the last of those that begin there: empty ones come before it
    if row + shard.rows > begins[group] + file.groups[group]:
        raise OutputConflictError(
            f"--retry-failed: {file.uri} had row groups of {old_groups} rows and has {file.groups}, "
            f"which cut the planned rows {row} to {row + shard.rows - 1}: write it with the row groups that it had"
        )
    return replace(shard, group=group, first_row=row - begins[group])


def _check_types(passed: pa.Schema, scanned: Scan) -> None:
    for field in passed:
        kind = scanned.types.get(field.name, field.type)
        if kind != field.type:
            raise OutputConflictError(
                f"--retry-failed: the column {field.name!r} was {field.type} and is {kind}, and data/ has it as {field.type}"
            )


def _check_grown(old: list[Any], scanned: Scan) -> None:
    """Raise OutputConflictError unless all new files and rows are at the end."""
    for number, file in enumerate(old):
        name, now = f"--extend: {file['uri']}", scanned.files[number] if number < len(scanned.files) else None
        if now is None or normal(now.uri) != file["uri"]:
            raise OutputConflictError(
                f"{name} was file {number + 1} of the manifest and is no more: new files come after the old"
            )
        if (rows := scanned.rows_of[number]) < file["rows"]:
            raise OutputConflictError(f"{name} had {file['rows']} rows and has {rows}: rows were taken away")
        if scanned.marked[number] != file["digest"] or now.columns != file["columns"]:
            raise OutputConflictError(f"{name}: its first {file['rows']} rows or its columns changed")
        if not _groups_grew(file["groups"], now.groups):
            raise OutputConflictError(
                f"{name}: its row groups were of {file['groups']} rows and are of {now.groups}: write new ones after the old"
            )


def _groups_grew(old: list[int], now: list[int]) -> bool:
    """The last one may have more rows, others come after it."""
    return not old or (now[: len(old) - 1] == old[:-1] and len(now) >= len(old) and now[len(old) - 1] >= old[-1])
