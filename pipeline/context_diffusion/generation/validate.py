"""What is wrong with a job before anything is paid: plan in memory, some rows loaded for real."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED, EXIT_TOO_MANY_FAILED, ConfigError, one_line
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import CONTEXT, CONTROL_IMAGE, ID, QUERY
from context_diffusion.core.sweep import combinations
from context_diffusion.core.uris import normal, protocol
from context_diffusion.generation.estimate import try_rows
from context_diffusion.generation.local_model import write_sheet
from context_diffusion.generation.plan import check_output, part_rows
from context_diffusion.generation.stages import LoadImages, ReadShard
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file, scan_texts
from context_diffusion.inputs.manifest_scan import Scan, column_warnings
from context_diffusion.inputs.rows import RowRules
from context_diffusion.inputs.url_policy import PROTOCOLS, allowed_prefixes
from context_diffusion.models.defaults import resolved_job
from context_diffusion.models.resolve import ResolvedModel, find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

NAMED = re.compile(r"""['"]([A-Za-z][A-Za-z0-9+.-]*://[^'"]*)""")  # the URIs in the repr of a row


@dataclass
class Sampled:
    """The rows that were loaded: how many, those that would fail, and, where their images are wanted, their tables."""

    rows: int
    problems: list[dict[str, Any]]
    tables: list[pa.Table]


@dataclass
class MissingPackages:
    """Protocols that rows name and that cannot be used here. why: by protocol, with its first URI; rows: how many name it;
    failing: rows that name one or more of them."""

    why: dict[str, str]
    rows: Counter[str]
    failing: int


def validate_job(job: GenerateJob, sample: int, pictures: str | None = None) -> dict[str, Any]:
    """Scans the whole manifest, loads `sample` rows spread over it that differ in contexts, writes a probe to
    OUTPUT and takes it away. -> rows, shards, problems of the sampled rows. pictures: where a sheet of their
    images goes; with it, what the job will take.

    Raises JobError for what stops the job, StorageError where OUTPUT cannot be written. Bad rows are told,
    for a run turns them into failed rows; `exit` is what a run would end with by them: 3 where some of the
    sample fail, 4 where they are more than max_failed allows."""
    storage = Storage(job.storage_options)
    model = find_model(job.model)
    job = resolved_job(job, model.defaults)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scan = Scan(job, files, storage)
    size = part_rows(scan.rows, job.rows_per_part, len(combinations(job.matrix)))
    shards = [shard for number in range(len(files)) for shard in scan.cut(number, size, 0)]
    missing = _missing_packages(job, files, storage)
    load = LoadImages.for_job(job, model, allowed_prefixes(job.allow, (file.uri for file in files)), storage)
    sampled = _load(load, _sample(job, files, scan, shards, sample, storage), keep=pictures is not None)
    checks = _check_writing(job, model, Output(normal(job.output), storage))
    estimate = _estimate(job, model, sampled.tables, scan.rows, pictures) if pictures else {}
    missing_warnings = [f"{why}; {missing.rows[scheme]} rows name it" for scheme, why in missing.why.items()]
    return {
        **checks,
        "rows": scan.rows,
        "shards": len(shards),
        "sampled": sampled.rows,
        "problems": sampled.problems,
        "warnings": [*column_warnings(scan.passed().names), *missing_warnings],
        "missing_packages": dict(missing.rows),
        "exit": _exit_code(job, scan.rows, sampled.rows, len(sampled.problems), missing.failing),
        "model_revision": model.revision,
        **estimate,
    }


def _load(load: LoadImages, tables: Iterable[pa.Table], keep: bool) -> Sampled:
    """Load the sampled rows. keep: with their pixels."""
    sampled = Sampled(0, [], [])
    for table in map(load, tables):
        sampled.rows += len(table)
        outcomes = table.select([ID, "error_code", "error_message"]).to_pylist()
        sampled.problems += [row for row in outcomes if row["error_code"] is not None]
        sampled.tables += [table] if keep else []
    return sampled


def _check_writing(job: GenerateJob, model: ResolvedModel, output: Output) -> dict[str, Any]:
    """Check that OUTPUT is this job's or new, and can be written. Raises OutputConflictError, StorageError."""
    if begun := output.storage.exists(output.plan):
        check_output(job, model, output)
    return {"output": output.root, "begun": begun, "creates_once": output.storage.try_writing(output.root)}


def _estimate(job: GenerateJob, model: ResolvedModel, tables: list[pa.Table], rows: int, pictures: str) -> dict[str, Any]:
    """Make the images of the sample into a sheet. Returns what the job will take."""
    lines, figures = try_rows(job, model, tables, rows)
    write_sheet(pictures, lines)
    return {**figures, "pictures": pictures}


def _missing_packages(job: GenerateJob, files: list[ManifestFile], storage: Storage) -> MissingPackages:
    """Check the protocols of all rows' sources, those outside of the sample too. Opens no store."""
    missing, known = MissingPackages({}, Counter(), 0), set[str]()
    names = RowRules.of_job(job).names
    columns = [names[name] for name in (QUERY, CONTEXT, CONTROL_IMAGE)]
    for row in chain.from_iterable(scan_texts(file, storage, columns) for file in files):
        uris = {protocol(uri): uri for uri in reversed(NAMED.findall(str(row)))}
        for scheme in sorted((uris.keys() - known) & PROTOCOLS):
            try:
                storage.check(uris[scheme])
            except ConfigError as error:
                missing.why[scheme] = one_line(str(error))
        known |= uris.keys()
        missing.rows.update(uris.keys() & missing.why.keys())
        missing.failing += not missing.why.keys().isdisjoint(uris)
    return missing


def _exit_code(job: GenerateJob, rows: int, sampled: int, failed: int, without: int) -> int:
    """What a run would end with, were all rows as the sampled ones. without: rows that lack a protocol's
    package for sure."""
    if not failed and not without:
        return EXIT_OK
    expected = max(failed, without, rows * failed // max(sampled, 1))
    return EXIT_TOO_MANY_FAILED if expected > job.failures_allowed(rows) else EXIT_ROWS_FAILED


def _sample(
    job: GenerateJob, files: list[ManifestFile], scan: Scan, shards: list[Shard], count: int, storage: Storage
) -> Iterator[pa.Table]:
    """So many rows, or all, spread evenly over the manifest, a table for each shard that has one of them. Of
    the rows from one place to the next, as far as the shard has them, the first whose contexts are new: a
    manifest of all pairs may have the same contexts at even distances."""
    count, first, seen = min(count, scan.rows), 0, set[int]()
    wanted = [number * scan.rows // count for number in range(count)]
    for shard in shards:
        here = wanted[bisect_left(wanted, first) : bisect_left(wanted, first + shard.rows)]
        if here:
            [table] = ReadShard(RowRules.of_job(job), files[shard.file], shard, scan.passed(), storage)()
            places = [row - first for row in here]
            pictures = table.select([QUERY, CONTEXT]).to_pylist()
            yield table.take([_newest(pictures, *reach, seen) for reach in pairwise([0, *places[1:], shard.rows])])
        first += shard.rows


def _newest(pictures: list[dict[str, Any]], first: int, last: int, seen: set[int]) -> int:
    """Of rows `first` to `last` the first one that shows most that is new: its contexts, then its query."""
    rows = pictures[first:last]
    keys = [(hash(str(row[CONTEXT])), hash(str(row[QUERY]))) for row in rows]  # bytes may lie in them
    best = min(range(len(rows)), key=lambda number: [key in seen for key in keys[number]])
    seen.update(keys[best])
    return first + best
