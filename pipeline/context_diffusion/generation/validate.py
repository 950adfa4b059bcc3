"""What is wrong with a job before anything is paid: plan in memory, some rows loaded for real."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED, EXIT_TOO_MANY_FAILED
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import CONTEXT, ID, QUERY
from context_diffusion.core.sweep import combinations
from context_diffusion.core.uris import normal
from context_diffusion.generation.estimate import try_rows
from context_diffusion.generation.local_model import write_sheet
from context_diffusion.generation.plan import check_output, part_rows
from context_diffusion.generation.protocol_scan import lacking
from context_diffusion.generation.stages import LoadImages, ReadShard
from context_diffusion.inputs.close_names import column_warnings
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file
from context_diffusion.inputs.manifest_scan import Scan
from context_diffusion.inputs.rows import RowRules
from context_diffusion.inputs.url_policy import allowed_prefixes
from context_diffusion.models.defaults import resolved_job
from context_diffusion.models.resolve import find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage


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
    without, unreadable = lacking(job, files, storage)
    load = LoadImages.for_job(job, model, allowed_prefixes(job.allow, (file.uri for file in files)), storage)
    looked, problems, kept = 0, [], []
    for table in _sample(job, files, scan, shards, sample, storage):
        loaded = load(table)
        looked += len(loaded)
        told = loaded.select([ID, "error_code", "error_message"]).to_pylist()
        problems += [row for row in told if row["error_code"] is not None]
        kept += [loaded] if pictures else []
    output = Output(normal(job.output), storage)
    if begun := storage.exists(output.plan):
        check_output(job, model, output)
    once = storage.try_writing(output.root)
    figures: dict[str, Any] = {}
    if pictures:
        lines, figures = try_rows(job, model, kept, scan.rows)
        write_sheet(pictures, lines)
        figures |= {"pictures": pictures}
    return {
        "output": output.root,
        "begun": begun,
        "rows": scan.rows,
        "shards": len(shards),
        "sampled": looked,
        "problems": problems,
        "warnings": [
            *column_warnings(scan.passed().names),
            *(f"{one.why}; {one.rows} rows name it" for one in without.values()),
        ],
        "missing_packages": {scheme: one.rows for scheme, one in without.items()},
        "exit": _exit_code(job, scan.rows, looked, len(problems), unreadable),
        "model_revision": model.revision,
        "creates_once": once,
        **figures,
    }


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
            yield table.take(
                [_newest(pictures, *reach, seen) for reach in pairwise([0, *places[1:], shard.rows])]
            )
        first += shard.rows


def _newest(pictures: list[dict[str, Any]], first: int, last: int, seen: set[int]) -> int:
    """Of rows `first` to `last` the first one that shows most that is new: its contexts, then its query."""
    rows = pictures[first:last]
    keys = [(hash(str(row[CONTEXT])), hash(str(row[QUERY]))) for row in rows]  # bytes may lie in them
    best = min(range(len(rows)), key=lambda number: [key in seen for key in keys[number]])
    seen.update(keys[best])
    return first + best
