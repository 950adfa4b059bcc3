"""Checks a job before any compute is spent: plans it in memory and loads a sample of its rows. Knows no
Ray."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import pyarrow as pa

from context_diffusion.core.errors import (
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_TOO_MANY_FAILED,
    ConfigError,
    one_line,
)
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Shard
from context_diffusion.core.schema import CONTEXT, ID, PROMPT, QUERY, SOURCES
from context_diffusion.core.sweep import combinations
from context_diffusion.core.uris import normal, protocol
from context_diffusion.generation.estimate import try_rows
from context_diffusion.generation.local_model import write_sheet
from context_diffusion.generation.plan import check_maps, check_output, part_rows, resolve_job
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import ReadShard, row_rules
from context_diffusion.inputs.manifest_files import ManifestFile, expand, open_file, scan_texts
from context_diffusion.inputs.manifest_scan import Scan, column_warnings
from context_diffusion.inputs.rows import RowRules
from context_diffusion.inputs.url_policy import PROTOCOLS, allowed_prefixes
from context_diffusion.models.native.words import read_words, vocabulary_of
from context_diffusion.models.resolution.resolve import ResolvedModel
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

WORDS = 20  # without an effect, that the summary names
NAMED_URI = re.compile(r"""['"]([A-Za-z][A-Za-z0-9+.-]*://[^'"]*)""")  # in the repr of a row


@dataclass
class LoadedSample:
    """Counts the sampled rows and holds those that failed and, if images are generated, the loaded tables."""

    rows: int
    problems: list[dict[str, Any]]
    tables: list[pa.Table]


@dataclass
class MissingPackages:
    """Counts rows with protocols whose package is missing.

    reasons: by protocol, with its first URI; rows: by protocol, the rows that name it; failing: the rows that
    name any of them."""

    reasons: dict[str, str]
    rows: Counter[str]
    failing: int


def validate_job(job: GenerateJob, sample: int, pictures: str | None = None) -> dict[str, Any]:
    """Scan the whole manifest, load `sample` rows spread over it, and try to write to OUTPUT.

    Returns the summary, with the counts and the problems of the sampled rows. pictures: where a sheet of
    their images is written; with it the summary also has an estimate of the job's time. `exit` is the code
    with which a run would end: 3 where sampled rows fail, 4 where more would fail than max_failed allows.
    Raises JobError for what stops the job, StorageError where OUTPUT cannot be written."""
    storage = Storage(job.storage_options)
    job, model = resolve_job(job)
    files = [open_file(uri, storage) for uri in expand(job.manifests, storage)]
    scan = Scan(job, files, storage)
    check_maps(job, model, scan)
    size = part_rows(scan.rows, job.rows_per_part, len(combinations(job.matrix)))
    shards = [shard for number in range(len(files)) for shard in scan.cut(number, size, 0)]
    missing = _missing_packages(job, files, storage)
    load = LoadImages.for_job(job, model, allowed_prefixes(job.allow, (file.uri for file in files)), storage)
    rules = row_rules(job, model)
    loaded = _load(load, _sample(rules, files, scan, shards, sample, storage), keep=pictures is not None)
    checks = _check_writing(job, model, Output(normal(job.output), storage))
    estimate = _estimate(job, model, loaded.tables, scan.rows, pictures) if pictures else {}
    words = _unknown_words(job, model, files, storage)
    missing_warnings = [
        f"{reason}; {missing.rows[scheme]} rows name it" for scheme, reason in missing.reasons.items()
    ]
    return {
        **checks,
        "rows": scan.rows,
        "shards": len(shards),
        "sampled": loaded.rows,
        "problems": loaded.problems,
        "warnings": [*column_warnings(scan.passed().names), *missing_warnings],
        **words,
        "missing_packages": dict(sorted(missing.rows.items())),
        "exit": _exit_code(job, scan.rows, loaded.rows, len(loaded.problems), missing.failing),
        "model_revision": model.revision,
        "licence": model.licence,
        **estimate,
    }


def _load(load: LoadImages, tables: Iterable[pa.Table], keep: bool) -> LoadedSample:
    """Load the images of the sampled rows. keep: keep the loaded tables."""
    loaded = LoadedSample(0, [], [])
    for table in map(load, tables):
        loaded.rows += len(table)
        outcomes = table.select([ID, "error_code", "error_message"]).to_pylist()
        loaded.problems += [row for row in outcomes if row["error_code"] is not None]
        loaded.tables += [table] if keep else []
    return loaded


def _check_writing(job: GenerateJob, model: ResolvedModel, output: Output) -> dict[str, Any]:
    """Check that OUTPUT is new or belongs to this job, and can be written. Raises OutputConflictError,
    StorageError."""
    begun = output.storage.exists(output.plan)
    if begun:
        check_output(job, model, output)
    return {"output": output.root, "begun": begun, "creates_once": output.storage.try_writing(output.root)}


def _estimate(
    job: GenerateJob, model: ResolvedModel, tables: list[pa.Table], rows: int, pictures: str
) -> dict[str, Any]:
    """Generate the images of the sample and write them as a contact sheet. Returns the estimate of the
    job."""
    lines, figures = try_rows(job, model, tables, rows)
    write_sheet(pictures, lines)
    return {**figures, "pictures": pictures}


def _missing_packages(job: GenerateJob, files: list[ManifestFile], storage: Storage) -> MissingPackages:
    """Check the protocols of the sources of all rows of the manifest. Connects to no store."""
    missing = MissingPackages({}, Counter(), 0)
    checked: set[str] = set()
    names = RowRules.of_job(job).names
    columns = [names[name] for name in SOURCES]
    for row in chain.from_iterable(scan_texts(file, storage, columns) for file in files):
        uris = {protocol(uri): uri for uri in reversed(NAMED_URI.findall(str(row)))}
        for scheme in sorted((uris.keys() - checked) & PROTOCOLS):
            try:
                storage.check(uris[scheme])
            except ConfigError as error:
                missing.reasons[scheme] = one_line(str(error))
        checked |= uris.keys()
        missing.rows.update(uris.keys() & missing.reasons.keys())
        missing.failing += not missing.reasons.keys().isdisjoint(uris)
    return missing


def _unknown_words(
    job: GenerateJob, model: ResolvedModel, files: list[ManifestFile], storage: Storage
) -> dict[str, Any]:
    """Count the words of all prompts that have no effect.

    Returns `unknown_words`, the rows that have some (null for a model whose text encoder reads any word), and
    `rows_by_unknown_word`, the commonest."""
    if model.folder is None:
        return {"unknown_words": None, "rows_by_unknown_word": {}}
    vocabulary = vocabulary_of(model.folder)
    column = RowRules.of_job(job).names[PROMPT]
    by_word: Counter[str] = Counter()
    rows = 0
    for row in chain.from_iterable(scan_texts(file, storage, [column]) for file in files):
        prompt = row.get(column)
        unknown = read_words(prompt, vocabulary).unknown if isinstance(prompt, str) else ()
        by_word.update(unknown)
        rows += bool(unknown)
    return {"unknown_words": rows, "rows_by_unknown_word": dict(by_word.most_common(WORDS))}


def _exit_code(job: GenerateJob, rows: int, sampled: int, failed: int, without_package: int) -> int:
    """Return the exit code of a run in which rows fail as often as the sampled ones.

    without_package: the rows that fail in any case because a package is missing."""
    if not failed and not without_package:
        return EXIT_OK
    expected = max(failed, without_package, rows * failed // max(sampled, 1))
    return EXIT_TOO_MANY_FAILED if expected > job.failures_allowed(rows) else EXIT_ROWS_FAILED


def _sample(
    rules: RowRules,
    files: list[ManifestFile],
    scan: Scan,
    shards: list[Shard],
    count: int,
    storage: Storage,
) -> Iterator[pa.Table]:
    """Yield `count` rows, or all, spread evenly over the manifest, one table per shard that has any.

    Each sampled row is the one with the newest contexts between its place and the next within the shard,
    since in a manifest of all pairs rows at even distances may have the same contexts.
    """
    count = min(count, scan.rows)
    places = [number * scan.rows // count for number in range(count)]
    seen: set[int] = set()
    first = 0
    for shard in shards:
        in_shard = places[bisect_left(places, first) : bisect_left(places, first + shard.rows)]
        if in_shard:
            [table] = ReadShard(rules, files[shard.file], shard, scan.passed(), storage)()
            sources = table.select([QUERY, CONTEXT]).to_pylist()
            starts = [0, *(place - first for place in in_shard[1:]), shard.rows]
            yield table.take([_newest(sources, start, end, seen) for start, end in pairwise(starts)])
        first += shard.rows


def _newest(sources: list[dict[str, Any]], first: int, last: int, seen: set[int]) -> int:
    """Return the first of the rows `first` to `last` with new contexts, else one with a new query. Adds it to
    `seen`."""
    rows = sources[first:last]
    keys = [(hash(str(row[CONTEXT])), hash(str(row[QUERY]))) for row in rows]  # sources may be inline bytes
    best = min(range(len(rows)), key=lambda number: [key in seen for key in keys[number]])
    seen.update(keys[best])
    return first + best
