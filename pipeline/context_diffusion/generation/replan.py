"""Change a plan: `--extend` for a manifest with appended rows, `--retry-failed` for one with corrected cells.

In both, the planned shards keep their numbers and rows, since the parts in data/ are named by them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
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

UNFINISHED = -1  # a file's bytes in plan.json until a correction is complete: no version of the manifest fits


def extend(record: Any, job: GenerateJob, output: Output, storage: Storage) -> Any:
    """Add shards for the manifest's new rows and return the new record. Raises OutputConflictError.

    _SUCCESS is deleted first and plan.json is replaced last, so the next run completes an interrupted
    extension."""
    old = record["manifest"]
    if any(file["bytes"] == UNFINISHED for file in old):
        raise OutputConflictError(
            "--extend: a run with --retry-failed was interrupted; rerun that command first"
        )
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    # A corrected row keeps its id, which a new row could derive from the former cells of the corrected one.
    planned = _planned_ids(output, len(old)) if record.get("corrected") else None
    scanned = Scan(job, files, storage, [file["rows"] for file in old], planned)
    _check_grown(old, scanned)
    output.storage.delete(output.success)
    first_shard = sum(file["shards"] for file in old)
    records = []
    for number in range(len(files)):
        planned_shards = (
            list(read_shards(output, number))[: old[number]["shards"]] if number < len(old) else []
        )
        first_row = old[number]["rows"] if planned_shards else 0
        new = list(scanned.cut(number, record["rows_per_part"], first_shard, first_row))
        first_shard += len(new)
        if new:
            write_shards(output, number, [*planned_shards, *new])
        records.append(file_record(scanned, number, len(planned_shards) + len(new)))
    record |= _job_keys(job, files) | {"rows": scanned.rows, "manifest": records}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def correct(record: Any, job: GenerateJob, output: Output, storage: Storage, passed: pa.Schema) -> Any:
    """Plan the manifest's present cells for the same rows in the same places, and return the new record.

    passed: the schema of the unknown manifest columns that the parts in data/ hold. Raises
    OutputConflictError where rows were added, removed or moved, as far as their ids and numbers show."""
    old = record["manifest"]
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    if [normal(file.uri) for file in files] != [file["uri"] for file in old]:
        raise OutputConflictError(
            "--retry-failed: the manifest has other files than the plan; rows must keep their places"
        )
    scanned = Scan(job, files, storage, planned=_planned_ids(output, len(old)))
    _check_rows(old, scanned)
    _check_types(passed, scanned)
    shards = [_relocated(list(read_shards(output, number)), number, scanned) for number in range(len(files))]
    output.storage.delete(output.success)
    # Until the last write the plan fits no version of the manifest, so that an interrupted correction is
    # repeated.
    unfinished = [file | {"bytes": UNFINISHED} for file in old]
    output.storage.replace(output.plan, json.dumps(record | {"manifest": unfinished}, indent=2).encode())
    _delete_orphans(output)
    for number, of_file in enumerate(shards):
        write_shards(output, number, of_file)
    records = [file_record(scanned, number, len(of_file)) for number, of_file in enumerate(shards)]
    record |= _job_keys(job, files) | {"manifest": records, "corrected": True}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def _job_keys(job: GenerateJob, files: list[ManifestFile]) -> dict[str, Any]:
    allow = allowed_prefixes(job.allow, (file.uri for file in files))
    return {"job": job.model_dump(mode="json"), "allow": allow}


def _planned_ids(output: Output, files: int) -> Callable[[int], Iterator[str | None]]:
    """Return what yields the ids of a file's rows from its parts in data/, None for rows without a part.

    files: the number of files of the plan.
    """
    finished = output.finished()

    def ids(number: int) -> Iterator[str | None]:
        if number >= files:
            return
        for shard in read_shards(output, number):
            yield from output.ids(shard.number) if shard.number in finished else [None] * shard.rows

    return ids


def _relocated(shards: list[Shard], number: int, scanned: Scan) -> list[Shard]:
    """Return a file's shards with the present places of their rows.

    The places follow from the shards' numbers of rows alone, so an interrupted correction can be repeated.
    Raises OutputConflictError where the row groups of a Parquet file cut a shard."""
    file = scanned.files[number]
    bounds = scanned.bounds[number]
    group_starts = [end - rows for end, rows in zip(accumulate(file.groups), file.groups, strict=True)]
    first, relocated = 0, []
    for shard in shards:
        end = first + shard.rows
        if file.format != "parquet":
            relocated.append(replace(shard, offset=bounds[first], size=bounds[end] - bounds[first]))
        else:
            # the last one that starts there: empty groups come before it
            group = bisect_right(group_starts, first) - 1
            if end > group_starts[group] + file.groups[group]:
                raise OutputConflictError(
                    f"--retry-failed: the row groups of {file.uri} ({file.groups} rows) cut the planned rows "
                    f"{first} to {end - 1}: write the file with its former row groups"
                )
            relocated.append(replace(shard, group=group, first_row=first - group_starts[group]))
        first = end
    return relocated


def _delete_orphans(output: Output) -> None:
    """Delete the images that no part names: an interrupted attempt generated them from the former cells."""
    finished = output.finished()
    for folder in ("images", "webdataset"):
        for name in output.storage.list(f"{output.root}/{folder}"):
            match = re.match(r"part-(\d+)", name)
            if match and int(match[1]) not in finished:
                for uri in output.storage.files(f"{output.root}/{folder}/{name}"):
                    output.storage.delete(uri)
    for shard, part in output.read_parts(["status", "file_name"]):
        if "failed" in part["status"].to_pylist():
            _delete_unnamed(output, shard, {str(name) for name in part["file_name"].to_pylist() if name})


def _delete_unnamed(output: Output, shard: int, names: set[str]) -> None:
    """Delete a shard's images that are not among the names, from its folder and its tar."""
    folder = f"images/{part_name(shard)}"
    for name in output.storage.list(f"{output.root}/{folder}"):
        if f"{folder}/{name}" not in names and name != "metadata.parquet":
            output.storage.delete(f"{output.root}/{folder}/{name}")
    tar = f"{output.root}/webdataset/{part_name(shard)}.tar"
    if output.storage.exists(tar):
        keys = {name.rsplit("/", 1)[1].split(".")[0] for name in names}  # of an image and its JSON
        named = {name: data for name, data in members(output.storage.read(tar)) if name.split(".")[0] in keys}
        output.storage.replace(tar, to_tar(named))


def _check_rows(old: list[Any], scanned: Scan) -> None:
    """Raise OutputConflictError where a file has another number of rows."""
    for file, rows in zip(old, scanned.rows_of, strict=True):
        if rows != file["rows"]:
            raise OutputConflictError(
                f"--retry-failed: {file['uri']} had {file['rows']} rows and has {rows}; correct its cells, "
                "but add no rows (a run with `--extend` does that) and remove none"
            )


def _check_types(passed: pa.Schema, scanned: Scan) -> None:
    """Raise OutputConflictError where data/ cannot hold the present type of an unknown column."""
    for field in passed:
        kind = scanned.types.get(field.name, field.type)
        # any value fits as text
        if kind == field.type or pa.types.is_null(kind) or pa.types.is_string(field.type):
            continue
        try:
            schemas = [pa.schema([(field.name, type_)]) for type_ in (field.type, kind)]
            unified = pa.unify_schemas(schemas, promote_options="permissive").field(field.name).type
        except pa.ArrowException:
            unified = None
        if unified != field.type:
            raise OutputConflictError(
                f"--retry-failed: the column {field.name!r} is now {kind}, but data/ holds it as {field.type}"
            )


def _check_grown(old: list[Any], scanned: Scan) -> None:
    """Raise OutputConflictError unless all new files and rows are at the end."""
    for number, file in enumerate(old):
        name = f"--extend: {file['uri']}"
        present = scanned.files[number] if number < len(scanned.files) else None
        if present is None or normal(present.uri) != file["uri"]:
            raise OutputConflictError(
                f"{name} is no longer file {number + 1} of the manifest: add new files after the old"
            )
        if (rows := scanned.rows_of[number]) < file["rows"]:
            raise OutputConflictError(f"{name} had {file['rows']} rows and has {rows}: rows were removed")
        is_changed = present.format != "jsonl" and present.columns != file["columns"]
        if scanned.marked[number] != file["digest"] or is_changed:
            raise OutputConflictError(f"{name}: its first {file['rows']} rows or its columns changed")
        if not _groups_grew(file["groups"], present.groups):
            raise OutputConflictError(
                f"{name}: its row groups had {file['groups']} rows and have {present.groups}: append new "
                "groups to the old"
            )


def _groups_grew(old: list[int], present: list[int]) -> bool:
    """Return whether only the last row group has more rows and further ones follow it."""
    return not old or (
        present[: len(old) - 1] == old[:-1] and len(present) >= len(old) and present[len(old) - 1] >= old[-1]
    )
