"""Plan a manifest as shards, once, and check that OUTPUT belongs to the job.

plan.json is the last file of a plan that is written: where it exists, the plan is complete, and every later
run takes its shards from it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import ConfigError, OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import dotted
from context_diffusion.core.model_parts import check_chunk
from context_diffusion.core.schema import CONTROL_IMAGE, output_digest
from context_diffusion.core.sweep import combinations
from context_diffusion.core.uris import normal
from context_diffusion.generation import replan
from context_diffusion.generation.shards import file_record, write_shards
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file
from context_diffusion.inputs.manifest_scan import Scan
from context_diffusion.inputs.url_policy import allowed_prefixes
from context_diffusion.models.resolution.defaults import resolved_job
from context_diffusion.models.resolution.resolve import ResolvedModel, find_model
from context_diffusion.outputs.image_metadata import versions
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

# keys that --retry-failed lets differ: rows may have failed because of them
CORRECTED = ("allow", "limits", "columns")
HINT = "if rows were appended, use `run --extend`; if rows were corrected, use `run --retry-failed`"


@dataclass(frozen=True)
class Plan:
    """What plan.json says.

    job: the current job, with its model's defaults and the planned parts of its model filled in; passed: the
    schema of the unknown manifest columns that are copied to the output; allow: the URI prefixes that rows
    may read."""

    job: GenerateJob
    files: list[ManifestFile]
    shards_of: list[int]
    rows: int
    rows_per_part: int
    passed: pa.Schema
    model: ResolvedModel
    allow: list[str]

    @property
    def shards(self) -> int:
        """The number of shards."""
        return sum(self.shards_of)


def part_rows(rows: int, rows_per_part: int, images: int = 1) -> int:
    """Return the rows of a shard: `rows_per_part`, or fewer so that a small manifest has about eight shards
    of at least four.

    images: the combinations of a matrix; a shard then has fewer rows, so that its work and memory stay the
    same."""
    return max(1, min(rows_per_part, max(4, -(-rows // 8))) // images)


def resolve_job(job: GenerateJob, commits: dict[str, str] | None = None) -> tuple[GenerateJob, ResolvedModel]:
    """Return the job with its model's defaults filled in, and the model. commits: known commits by hub id.

    Raises ConfigError, ModelError."""
    model = find_model(job.model, commits)
    check_chunk(job.cluster.chunk, model.kind, job.cluster.gpus_per_actor == 0)
    return resolved_job(job, model.defaults), model


def open_plan(
    job: GenerateJob,
    output: Output,
    storage: Storage,
    accept_change: bool = False,
    extend: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """Return the plan in OUTPUT if it belongs to this job, and write a new one if there is none.

    extend: the manifest may have grown, and shards are added for its new rows; retry_failed: the manifest's
    cells may have been corrected, and the job's keys CORRECTED may differ. Raises ManifestError,
    OutputConflictError."""
    if not output.storage.exists(output.plan):
        _write_plan(job, output, storage)
    record = output.read_plan()
    _check_columns(record, output)
    job, model = resolve_job(job, record["model"]["commits"])
    changed = _changed_keys(record, job)
    may_change = {*(["manifest"] if extend else []), *(CORRECTED if retry_failed else [])}
    forbidden = {key: values for key, values in changed.items() if key.split(".")[0] not in may_change}
    _check_same(record, forbidden, model, output, accept_change)
    passed = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["passed"])))
    differing = _differing(record, job, storage)
    if differing and extend:
        record = replan.extend(record, job, output, storage)
    elif retry_failed and (differing or changed):
        record = replan.correct(record, job, output, storage, passed)
    elif differing:
        raise OutputConflictError(f"{differing}; {HINT}, else choose another `output:`")
    files = [ManifestFile(f["uri"], f["format"], f["columns"], f["groups"]) for f in record["manifest"]]
    shards_of = [f["shards"] for f in record["manifest"]]
    # Engines load the planned model, and images name it.
    job = job.model_copy(update={"model": model.parts or job.model})
    return Plan(
        job, files, shards_of, record["rows"], record["rows_per_part"], passed, model, record["allow"]
    )


def check_output(job: GenerateJob, model: ResolvedModel, output: Output) -> None:
    """Raise OutputConflictError if OUTPUT belongs to another job, manifest or version, as a run would.

    job: with its model's defaults filled in.
    """
    record = output.read_plan()
    _check_columns(record, output)
    _check_same(record, _changed_keys(record, job), model, output, accept_change=False)
    if differing := _differing(record, job, output.storage):
        raise OutputConflictError(f"{differing}; {HINT}")


def check_maps(job: GenerateJob, model: ResolvedModel, scanned: Scan) -> None:
    """Raise ConfigError if rows must bring control maps and no file of the manifest has any."""
    reason = model.defaults.no_map(job.control_kinds)
    if reason and not scanned.has_column(CONTROL_IMAGE):
        raise ConfigError(f"{reason}, which {', '.join(job.manifests)} lacks")


def _write_plan(job: GenerateJob, output: Output, storage: Storage) -> None:
    job, model = resolve_job(job)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scanned = Scan(job, files, storage)
    check_maps(job, model, scanned)
    size = part_rows(scanned.rows, job.rows_per_part, len(combinations(job.matrix)))
    first, records = 0, []
    for number in range(len(files)):
        shards = list(scanned.cut(number, size, first))
        first += len(shards)
        write_shards(output, number, shards)
        records.append(file_record(scanned, number, len(shards)))
    record = {
        "job": job.model_dump(mode="json"),
        "rows": scanned.rows,
        "rows_per_part": size,
        "model": {
            "name": model.name,
            "revision": model.revision,
            "licence": model.licence,
            "commits": model.parts.revision if model.parts else {},
        },
        "versions": versions(),
        "columns": output_digest(),
        "allow": allowed_prefixes(job.allow, (file.uri for file in files)),
        "manifest": records,
        "passed": base64.b64encode(scanned.passed().serialize()).decode(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Two drivers may plan at once: equal jobs write equal plans, and _check_same finds another job's.
    output.storage.create(output.plan, json.dumps(record, indent=2).encode())


def _changed_keys(record: Any, job: GenerateJob) -> dict[str, str]:
    """Return the dotted keys that affect pixels or shards and differ between the plan's job and this one,
    with both values."""
    planned = dotted(GenerateJob.model_validate(record["job"]).pixel_keys())
    current = dotted(job.pixel_keys())
    return {
        key: f"{key}: {planned.get(key)!r} planned, {current.get(key)!r} now"
        for key in sorted(current | planned)
        if current.get(key) != planned.get(key)
    }


def _check_columns(record: Any, output: Output) -> None:
    """Raise OutputConflictError if the parts in OUTPUT have other columns than those that are written now."""
    if record.get("columns") != output_digest():
        raise OutputConflictError(
            f"{output.root} was planned by another version of this package, whose data/ has other columns; "
            "choose another `output:`"
        )


def _check_same(
    record: Any, changed: dict[str, str], model: ResolvedModel, output: Output, accept_change: bool
) -> None:
    """Raise OutputConflictError if the plan in OUTPUT belongs to another job, model or version.

    changed: the keys that differ and must not, as `_changed_keys` returns them.
    """
    if changed:
        hint = "choose another `output:`"
        if all(key.split(".")[0] in CORRECTED for key in changed):
            hint = f"--retry-failed generates the failed rows with the job's present values, or {hint}"
        raise OutputConflictError(
            f"{output.root} belongs to another job ({'; '.join(changed.values())}); {hint}"
        )
    if model.revision != record["model"]["revision"]:
        raise OutputConflictError(
            f"{output.root} was started with other weights of the model {record['model']['name']!r}"
        )
    now = versions()
    differ = [
        f"{name} {version} then, {now[name]} now"
        for name, version in record["versions"].items()
        if now[name] != version
    ]
    if differ and not accept_change:
        raise OutputConflictError(
            f"{output.root} was started with other versions ({'; '.join(differ)}), which may change pixels; "
            "--accept-change continues with the present ones"
        )


def _differing(record: Any, job: GenerateJob, storage: Storage) -> str | None:
    """Describe how the manifest's files differ from the planned ones; None if they are the same."""
    files = {normal(uri) for uri in expand(job.manifests, storage)}
    planned = {file["uri"] for file in record["manifest"]}
    since = f"since {record['job']['output']} was planned"
    if new := sorted(files - planned):
        return f"{len(new)} file(s) were added to the manifest {since}, such as {new[0]}"
    if missing := sorted(planned - files):
        return f"{missing[0]} was removed from the manifest {since}"
    for file in record["manifest"]:
        fingerprint = storage.fingerprint(file["uri"])
        if fingerprint != {key: file[key] for key in fingerprint}:
            return f"{file['uri']} changed {since}"
    return None
