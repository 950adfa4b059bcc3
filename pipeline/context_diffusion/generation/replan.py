"""A plan that is changed: `--extend` for a manifest that grew, `--retry-failed` for one whose rows were corrected.

In both, the shards that stand keep their numbers and rows, since the parts in data/ are named by them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard, part_name
from context_diffusion.core.uris import normal
from context_diffusion.generation.shards import file_record, read_shards, write_shards
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file
from context_diffusion.inputs.manifest_scan import Scan
from context_diffusion.inputs.url_policy import allowed_prefixes
from context_diffusion.outputs.output_folder import Output, members, to_tar
from context_diffusion.storage.filesystem import Storage

UNFINISHED = -1  # as a file's bytes in plan.json: no version of the manifest fits, until a correction is complete


def extend(record: Any, job: GenerateJob, output: Output, storage: Storage) -> Any:
    """Add the shards of what is new to the plan. _SUCCESS goes first and plan.json is changed last, so a run that is broken
    off in between is extended by the next. Returns the new record. Raises OutputConflictError."""
    old = record["manifest"]
    if any(file["bytes"] == UNFINISHED for file in old):
        raise OutputConflictError("--extend: a run with --retry-failed was broken off; give it again first")
    files, made = [open_file(uri, storage) for uri in expand(job.manifests, storage)], output.finished()
    # A corrected row keeps the id that it had, which a new row may derive from what the old one said.
    planned = (lambda number: _planned_ids(output, number, made, len(old))) if record.get("corrected") else None
    scanned = Scan(job, files, storage, [file["rows"] for file in old], planned)
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
    record |= {"job": job.model_dump(mode="json"), "allow": _allow(job, files), "rows": scanned.rows, "manifest": records}
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
    scanned = Scan(job, files, storage, planned=lambda number: _planned_ids(output, number, made, len(old)))
    for file, rows in zip(old, scanned.rows_of, strict=True):
        if rows != file["rows"]:
            raise OutputConflictError(
                f"--retry-failed: {file['uri']} had {file['rows']} rows and has {rows}; correct its cells, "
                "but add no rows (`--extend` does that in a run of its own) and remove none"
            )
    _check_types(passed, scanned)
    shards = [_moved(list(read_shards(output, number)), number, scanned) for number in range(len(files))]
    output.storage.delete(output.success)
    # Until the last write the plan fits no version of the manifest: were this broken off, the same command does it again.
    unfinished = [file | {"bytes": UNFINISHED} for file in old]
    output.storage.replace(output.plan, json.dumps(record | {"manifest": unfinished}, indent=2).encode())
    _drop_pictures(output, made)
    for number, moved in enumerate(shards):
        write_shards(output, number, moved)
    records = [file_record(scanned, number, len(moved)) for number, moved in enumerate(shards)]
    record |= {"job": job.model_dump(mode="json"), "allow": _allow(job, files), "manifest": records, "corrected": True}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def _allow(job: GenerateJob, files: list[ManifestFile]) -> list[str]:
    return allowed_prefixes(job.allow, (file.uri for file in files))


def _planned_ids(output: Output, number: int, made: set[int], files: int) -> Iterator[str | None]:
    """The ids of a file's rows as its parts in data/ have them; None for rows that were not made yet. files: how many the
    plan has."""
    if number >= files:
        return
    for shard in read_shards(output, number):
        yield from output.ids(shard.number) if shard.number in made else [None] * shard.rows


def _moved(shards: list[Shard], number: int, scanned: Scan) -> list[Shard]:
    """A file's shards with the places where their rows are now. It follows from their numbers of rows alone, so that what
    was broken off can be done again. Raises OutputConflictError where a Parquet file's row groups cut a shard."""
    file, bounds, row, moved = scanned.files[number], scanned.bounds[number], 0, []
    begins = [end - rows for end, rows in zip(accumulate(file.groups), file.groups, strict=True)]
    for shard in shards:
        end = row + shard.rows
        if file.format != "parquet":
            moved.append(replace(shard, offset=bounds[row], size=bounds[end] - bounds[row]))
        else:
            group = bisect_right(begins, row) - 1  # the last of those that begin there: empty ones come before it
            if end > begins[group] + file.groups[group]:
                raise OutputConflictError(
                    f"--retry-failed: {file.uri} has row groups of {file.groups} rows, which cut the planned rows {row} to "
                    f"{end - 1}: write it with the row groups that it had"
                )
            moved.append(replace(shard, group=group, first_row=row - begins[group]))
        row = end
    return moved


def _drop_pictures(output: Output, made: set[int]) -> None:
    """Delete the pictures that no part names: an attempt that was broken off made them of what the rows said then."""
    for folder in ("images", "webdataset"):
        for name in output.storage.list(f"{output.root}/{folder}"):
            match = re.match(r"part-(\d+)", name)
            if match and int(match[1]) not in made:
                for uri in output.storage.files(f"{output.root}/{folder}/{name}"):
                    output.storage.delete(uri)
    for shard, part in output.read_parts(["status", "file_name"]):
        if "failed" in part["status"].to_pylist():
            _drop_unnamed(output, shard, {str(name) for name in part["file_name"].to_pylist() if name})


def _drop_unnamed(output: Output, shard: int, names: set[str]) -> None:
    """Delete a shard's pictures that are not among the names, in its folder and in its tar."""
    folder = f"images/{part_name(shard)}"
    for name in output.storage.list(f"{output.root}/{folder}"):
        if f"{folder}/{name}" not in names and name != "metadata.parquet":
            output.storage.delete(f"{output.root}/{folder}/{name}")
    tar = f"{output.root}/webdataset/{part_name(shard)}.tar"
    if output.storage.exists(tar):
        keys = {name.rsplit("/", 1)[1].split(".")[0] for name in names}  # a picture's and its JSON's
        kept = {name: data for name, data in members(output.storage.read(tar)) if name.split(".")[0] in keys}
        output.storage.replace(tar, to_tar(kept))


def _check_types(passed: pa.Schema, scanned: Scan) -> None:
    """Raise OutputConflictError where data/ cannot hold what a column that we don't know says now."""
    for field in passed:
        kind = scanned.types.get(field.name, field.type)
        if kind == field.type or pa.types.is_null(kind) or pa.types.is_string(field.type):  # as text stands anything
            continue
        try:
            schemas = [pa.schema([(field.name, type_)]) for type_ in (field.type, kind)]
            both = pa.unify_schemas(schemas, promote_options="permissive").field(field.name).type
        except pa.ArrowException:
            both = None
        if both != field.type:
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
