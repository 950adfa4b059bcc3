"""Manifest -> shards, once; what OUTPUT belongs to; what is finished and what is left.

plan.json is written last of the plan: it exists = the plan stands, and every later run takes its shards from it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_diffusion.config import GenerateJob
from context_diffusion.errors import OutputConflictError
from context_diffusion.manifest import ManifestFile, expand, open_file
from context_diffusion.matrix import combinations
from context_diffusion.model.defaults import resolved_job
from context_diffusion.model.source import Source, find_model
from context_diffusion.output import Output, to_parquet
from context_diffusion.recipe import versions
from context_diffusion.scan import Scan
from context_diffusion.schema import Shard
from context_diffusion.storage import Storage, normal

SHARD_COLUMNS = ("number", "file", "first_row", "rows", "group", "offset", "size")


@dataclass(frozen=True)
class Plan:
    """What plan.json says. job: the one at hand, with what it leaves out filled in by its model. passed: the manifest's
    columns that we don't know, with their types."""

    job: GenerateJob
    files: list[ManifestFile]
    shards_of: list[int]
    rows: int
    rows_per_part: int
    passed: pa.Schema
    model: Source

    @property
    def shards(self) -> int:
        return sum(self.shards_of)


def part_rows(rows: int, rows_per_part: int, images: int = 1) -> int:
    """Rows of a shard: as asked, but small manifests are cut into about eight, of four rows at least. images: that a matrix
    makes of each, which leave fewer rows, so that a shard stays as much work and memory."""
    return max(1, min(rows_per_part, max(4, -(-rows // 8))) // images)


def open_plan(job: GenerateJob, output: Output, storage: Storage, accept_change: bool = False, extend: bool = False) -> Plan:
    """The plan of OUTPUT: the one that stands there, if it is this job's, else a new one. extend: the manifest may have
    grown; shards of what is new are added.

    Raises ManifestError, OutputConflictError.
    """
    if not output.storage.exists(output.plan):
        _write_plan(job, output, storage)
    record = output.read_json(output.plan)
    model = find_model(job.model, record["model"]["commits"])
    job = resolved_job(job, model.defaults)
    _check_same(record, job, model, output, accept_change, extend)
    if differing := _differing(record, job, storage):
        if not extend:
            hint = "if the manifest only grew, --extend makes what is new, else choose another `output:`"
            raise OutputConflictError(f"{differing}; {hint}")
        record = _extend(record, job, output, storage)
    passed = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["passed"])))
    files = [ManifestFile(f["uri"], f["format"], f["columns"], f["groups"]) for f in record["manifest"]]
    shards_of = [f["shards"] for f in record["manifest"]]
    return Plan(job, files, shards_of, record["rows"], record["rows_per_part"], passed, model)


def check_output(job: GenerateJob, model: Source, output: Output) -> None:
    """Raise OutputConflictError where a run would, since OUTPUT belongs to another job, manifest or version. job: with its
    model's defaults."""
    record = output.read_json(output.plan)
    _check_same(record, job, model, output, accept_change=False, extend=False)
    if differing := _differing(record, job, output.storage):
        raise OutputConflictError(f"{differing}; if the manifest only grew, `run --extend` makes what is new")


def read_shards(output: Output, file: int) -> Iterator[Shard]:
    """The shards of one manifest file."""
    table = pq.read_table(io.BytesIO(output.storage.read(output.shards(file))))
    for batch in table.to_batches(4096):
        columns = [batch.column(name).to_pylist() for name in SHARD_COLUMNS]
        yield from (Shard(*values) for values in zip(*columns, strict=True))


def _write_plan(job: GenerateJob, output: Output, storage: Storage) -> None:
    model = find_model(job.model)
    job = resolved_job(job, model.defaults)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scanned = Scan(job, files, storage)
    size, first, records = part_rows(scanned.rows, job.rows_per_part, len(combinations(job.matrix))), 0, []
    for number in range(len(files)):
        shards = list(scanned.cut(number, size, first))
        first += len(shards)
        _write_shards(output, number, shards)
        records.append(_file_record(scanned, number, len(shards)))
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


def _extend(record: Any, job: GenerateJob, output: Output, storage: Storage) -> Any:
    """Adds the shards of what is new; those that stand stay as they are. _SUCCESS goes first, plan.json is changed last, so
    a run that is broken off in between is extended by the next. -> the new record. Raises OutputConflictError."""
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
            _write_shards(output, number, [*known, *new])
        records.append(_file_record(scanned, number, len(known) + len(new)))
    record |= {"job": job.model_dump(mode="json"), "rows": scanned.rows, "manifest": records}
    output.storage.replace(output.plan, json.dumps(record, indent=2).encode())
    return record


def _check_grown(old: list[Any], scanned: Scan) -> None:
    """Are the new files and rows all at the end?"""
    for number, file in enumerate(old):
        told, now = f"--extend: {file['uri']}", scanned.files[number] if number < len(scanned.files) else None
        if now is None or normal(now.uri) != file["uri"]:
            raise OutputConflictError(
                f"{told} was file {number + 1} of the manifest and is no more: new files come after the old"
            )
        if (rows := scanned.rows_of[number]) < file["rows"]:
            raise OutputConflictError(f"{told} had {file['rows']} rows and has {rows}: rows were taken away")
        if scanned.marked[number] != file["digest"] or now.columns != file["columns"]:
            raise OutputConflictError(f"{told}: its first {file['rows']} rows or its columns changed")
        if not _groups_grew(file["groups"], now.groups):
            raise OutputConflictError(
                f"{told}: its row groups were of {file['groups']} rows and are of {now.groups}: write new ones after the old"
            )


def _groups_grew(old: list[int], now: list[int]) -> bool:
    """The last one may have more rows, others come after it."""
    return not old or (now[: len(old) - 1] == old[:-1] and len(now) >= len(old) and now[len(old) - 1] >= old[-1])


def _file_record(scanned: Scan, number: int, shards: int) -> dict[str, Any]:
    file = scanned.files[number]
    return {
        "uri": normal(file.uri),
        "format": file.format,
        "columns": file.columns,
        "groups": file.groups,
        "rows": scanned.rows_of[number],
        "digest": scanned.digests[number],
        "shards": shards,
        **scanned.storage.fingerprint(file.uri),
    }


def _write_shards(output: Output, number: int, shards: list[Shard]) -> None:
    data = to_parquet(pa.Table.from_pylist([vars(shard) for shard in shards], _SHARD_SCHEMA))
    output.storage.replace(output.shards(number), data)


_SHARD_SCHEMA = pa.schema([(name, pa.int64()) for name in SHARD_COLUMNS])


def _flat(keys: dict[str, Any]) -> dict[str, Any]:
    """{"settings": {"seed": 1}} -> {"settings.seed": 1}, as `--set` names them."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def _check_same(record: Any, job: GenerateJob, model: Source, output: Output, accept_change: bool, extend: bool) -> None:
    """Is the plan that stands in OUTPUT this job's, by these versions?"""
    there, ours = _flat(GenerateJob.model_validate(record["job"]).pixel_keys()), _flat(job.pixel_keys())
    changed = [
        f"{key}: {there.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours | there)
        if ours.get(key) != there.get(key) and not (extend and key == "manifest")
    ]
    if changed:
        raise OutputConflictError(f"{output.root} holds another job's output ({'; '.join(changed)}); choose another `output:`")
    if model.revision != record["model"]["revision"]:
        raise OutputConflictError(f"{output.root} was begun with other weights of the model {record['model']['name']!r}")
    differ = [f"{k} {v} there, {versions()[k]} here" for k, v in record["versions"].items() if versions()[k] != v]
    if differ and not accept_change:
        raise OutputConflictError(
            f"{output.root} was begun with other versions ({'; '.join(differ)}): pixels may differ; --accept-change goes on"
        )


def _differing(record: Any, job: GenerateJob, storage: Storage) -> str | None:
    """What is other about the manifest than when OUTPUT was planned; None: nothing."""
    files = {normal(uri) for uri in expand(job.manifests, storage)}
    planned = {file["uri"] for file in record["manifest"]}
    since = f"since {record['job']['output']} was planned"
    if new := sorted(files - planned):
        return f"{len(new)} file(s) of the manifest, such as {new[0]}, are new {since}"
    if gone := sorted(planned - files):
        return f"{gone[0]} is gone from the manifest {since}"
    for file in record["manifest"]:
        now = storage.fingerprint(file["uri"])
        if now != {key: file[key] for key in now}:
            return f"{file['uri']} changed {since}"
    return None
