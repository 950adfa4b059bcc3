"""Manifest -> shards, once; what OUTPUT belongs to; what is finished and what is left.

plan.json is written last of the plan: it exists = the plan stands, and every later run takes its shards from it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.sweep import combinations
from context_diffusion.core.uris import normal
from context_diffusion.generation import replan
from context_diffusion.generation.shards import file_record, write_shards
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file
from context_diffusion.inputs.manifest_scan import Scan
from context_diffusion.models.defaults import resolved_job
from context_diffusion.models.resolve import ResolvedModel, find_model
from context_diffusion.outputs.image_metadata import versions
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

CORRECTED = ("allow", "limits", "columns")  # keys that --retry-failed lets differ: rows may have failed because of them
OTHERWISE = "if the manifest only grew, `run --extend` makes what is new; if rows were corrected, `run --retry-failed` takes them"


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
    model: ResolvedModel

    @property
    def shards(self) -> int:
        return sum(self.shards_of)


def part_rows(rows: int, rows_per_part: int, images: int = 1) -> int:
    """Rows of a shard: as asked, but small manifests are cut into about eight, of four rows at least. images: that a matrix
    makes of each, which leave fewer rows, so that a shard stays as much work and memory."""
    return max(1, min(rows_per_part, max(4, -(-rows // 8))) // images)


def open_plan(
    job: GenerateJob,
    output: Output,
    storage: Storage,
    accept_change: bool = False,
    extend: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """The plan of OUTPUT: the one that stands there, if it is this job's, else a new one. extend: the manifest may have
    grown, and shards of what is new are added. retry_failed: its cells may be other, and so may CORRECTED of the job's keys.

    Raises ManifestError, OutputConflictError.
    """
    if not output.storage.exists(output.plan):
        _write_plan(job, output, storage)
    record = output.read_json(output.plan)
    model = find_model(job.model, record["model"]["commits"])
    job = resolved_job(job, model.defaults)
    changed = _changed_keys(record, job)
    may_change = {*(["manifest"] if extend else []), *(CORRECTED if retry_failed else [])}
    _check_same(record, [key for key in changed if key.split(".")[0] not in may_change], job, model, output, accept_change)
    passed = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["passed"])))
    differing = _differing(record, job, storage)
    if differing and extend:
        record = replan.extend(record, job, output, storage)
    elif retry_failed and (differing or changed):
        record = replan.correct(record, job, output, storage, passed)
    elif differing:
        raise OutputConflictError(f"{differing}; {OTHERWISE}, else choose another `output:`")
    files = [ManifestFile(f["uri"], f["format"], f["columns"], f["groups"]) for f in record["manifest"]]
    shards_of = [f["shards"] for f in record["manifest"]]
    return Plan(job, files, shards_of, record["rows"], record["rows_per_part"], passed, model)


def check_output(job: GenerateJob, model: ResolvedModel, output: Output) -> None:
    """Raise OutputConflictError where a run would, since OUTPUT belongs to another job, manifest or version. job: with its
    model's defaults."""
    record = output.read_json(output.plan)
    _check_same(record, _changed_keys(record, job), job, model, output, accept_change=False)
    if differing := _differing(record, job, output.storage):
        raise OutputConflictError(f"{differing}; {OTHERWISE}")


def _write_plan(job: GenerateJob, output: Output, storage: Storage) -> None:
    model = find_model(job.model)
    job = resolved_job(job, model.defaults)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scanned = Scan(job, files, storage)
    size, first, records = part_rows(scanned.rows, job.rows_per_part, len(combinations(job.matrix))), 0, []
    for number in range(len(files)):
        shards = list(scanned.cut(number, size, first))
        first += len(shards)
        write_shards(output, number, shards)
        records.append(file_record(scanned, number, len(shards)))
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


def _flat(keys: dict[str, Any]) -> dict[str, Any]:
    """{"settings": {"seed": 1}} -> {"settings.seed": 1}, as `--set` names them."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def _changed_keys(record: Any, job: GenerateJob) -> list[str]:
    """The dotted keys that change pixels or the cut into shards and differ between the plan's job and this one."""
    there, ours = _flat(GenerateJob.model_validate(record["job"]).pixel_keys()), _flat(job.pixel_keys())
    return [key for key in sorted(ours | there) if ours.get(key) != there.get(key)]


def _check_same(
    record: Any, changed: Sequence[str], job: GenerateJob, model: ResolvedModel, output: Output, accept_change: bool
) -> None:
    """Raise OutputConflictError where the plan that stands in OUTPUT is not this job's, by these versions. changed: keys
    that differ and may not."""
    if changed:
        there, ours = _flat(GenerateJob.model_validate(record["job"]).pixel_keys()), _flat(job.pixel_keys())
        differences = "; ".join(f"{key}: {there.get(key)!r} there, {ours.get(key)!r} here" for key in changed)
        hint = "choose another `output:`"
        if all(key.split(".")[0] in CORRECTED for key in changed):
            hint = "--retry-failed makes the failed rows with what the job says now, else " + hint
        raise OutputConflictError(f"{output.root} holds another job's output ({differences}); {hint}")
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
