"""The evaluate job: scores of finished pictures, and of the same pictures with what is another's, in this process."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED, JobError, OutputConflictError, RowError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import ID, SCORES, columns_of
from context_diffusion.core.uris import normal
from context_diffusion.evaluation.compare import compared
from context_diffusion.evaluation.distances import References, reference_sources
from context_diffusion.evaluation.pairs import Pair, find_pairs, source_key
from context_diffusion.evaluation.scores import measure
from context_diffusion.evaluation.shuffled_controls import SWAPPED, auc, others
from context_diffusion.inputs.decode import resize
from context_diffusion.inputs.image_sources import ImageSource, read_pixels
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage
from context_diffusion.storage.parquet_files import to_parquet

Row = dict[str, Any]
CACHED_IMAGES = 64  # decoded queries and contexts


def run_evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Writes scores.parquet, summary.json and what `compare` asks for. -> the summary, `exit` in it. Raises JobError for a
    wrong job."""
    started, storage = time.perf_counter(), Storage(job.storage_options)
    output = Output(normal(job.output), storage)
    if storage.exists(output.plan):
        raise OutputConflictError(f"output: {output.root} is a generate job's OUTPUT; choose another folder")
    if "prompt" in job.score:
        from context_diffusion.evaluation.prompt import load_judge  # torch

        load_judge(job.judge)
    references = "reference" in job.columns or job.reference
    if "similarity" in job.score or references:
        from context_diffusion.evaluation.similarity import load_embedding  # torch

        load_embedding(job.encoder)
    pairs, allow = find_pairs(job, storage)
    other, others_allow = find_pairs(job.model_copy(update={"images": job.compare}), storage) if job.compare else ([], [])
    if job.compare and not {pair.id for pair in pairs} & {pair.id for pair in other if pair.picture and not pair.error}:
        raise JobError(f"compare: {job.compare} has none of the rows of {job.images}, such as {pairs[0].id!r}")
    folders = [normal(folder) for folder in (job.images, job.compare, job.reference) if folder]
    loader = _Loader(job.limits, [*allow, *others_allow, *folders], storage)
    measured = References(job, reference_sources(job, pairs, storage), loader.pixels) if references else None
    rows, controls = [], []
    for pair, another in zip(pairs, others(pairs), strict=True):
        row, control = _score(pair, another, loader, job)
        rows.append(row)
        controls.append(control)
    storage.replace(f"{output.root}/scores.parquet", to_parquet(pa.Table.from_pylist(rows, SCORES)))
    summary = {"output": output.root, **_counts(rows), "scores": _statistics(rows, controls, columns_of(job.score))}
    if measured:
        summary["distances"] = measured.distances(pairs)
    if job.compare:
        summary["compare"] = _compare(job, output, rows, other, loader, measured)
    seconds = time.perf_counter() - started
    summary |= {"skipped": 0, "seconds": round(seconds, 2), "images_per_second": round(summary["images"] / seconds, 3)}
    failed = summary["failed"] or summary.get("compare", summary)["failed"]
    summary["exit"] = EXIT_ROWS_FAILED if failed else EXIT_OK
    storage.replace(output.summary, json.dumps(summary | {"of": job.images}, indent=2).encode())
    return summary


def _compare(
    job: EvaluateJob, output: Output, rows: list[Row], other: list[Pair], loader: _Loader, measured: References | None
) -> Row:
    """Write the other system's compare.parquet. Returns what summary.json says of both."""
    theirs = [_score(pair, {}, loader, job)[0] for pair in other]
    output.storage.replace(f"{output.root}/compare.parquet", to_parquet(pa.Table.from_pylist(theirs, SCORES)))
    summary = {"of": job.compare, **_counts(theirs), "scores": compared(rows, theirs, columns_of(job.score))}
    return summary | {"distances": measured.distances(other)} if measured else summary


@dataclass
class _Loader:
    """Sources -> pixels. Contexts repeat over rows: the last ones are kept."""

    limits: Limits
    allow: list[str]
    storage: Storage
    kept: dict[Hashable, Pixels] = field(default_factory=dict)

    def pixels(self, source: ImageSource) -> Pixels:
        """As it is. Raises RowError."""
        return read_pixels(source, self.allow, self.limits, self.storage)

    def fitted(self, source: ImageSource, image: Pixels, fit: Fit) -> Pixels:
        """At the size of the picture that was made of it."""
        key = (source_key(source), image.shape, fit)
        if key not in self.kept:
            pixels = resize(self.pixels(source), image.shape[1], image.shape[0], fit)
            if len(self.kept) == CACHED_IMAGES:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = pixels
        return self.kept[key]

    def sides(self, image: Pixels, query: Pair, contexts: Pair, prompt: Pair) -> dict[str, Any]:
        """What a picture is measured against, each side from a pair of its own."""
        return {
            "query": self.fitted(query.query, image, query.fit),
            "contexts": [self.fitted(source, image, "crop") for source in contexts.contexts],
            "prompt": prompt.prompt,
        }


def _score(pair: Pair, another: dict[str, Pair | None], loader: _Loader, job: EvaluateJob) -> tuple[Row, Row]:
    """-> the row of scores.parquet, and the control's scores, where there is one."""
    row: Row = {ID: pair.id, "index": pair.index}
    if pair.error:
        return row | dict(zip(("error_code", "error_message"), pair.error, strict=True)), {}
    assert pair.picture is not None
    try:
        image = loader.pixels(pair.picture)
        own = loader.sides(image, pair, pair, pair)
    except RowError as error:
        return row | {"error_code": str(error.code), "error_message": error.message}, {}
    columns = columns_of(job.score)
    row |= {column: measure(column, image, **own, judge=job.judge, encoder=job.encoder) for column in columns}
    if not another:
        return row, {}
    try:
        shuffled = loader.sides(image, *(another[side] or pair for side in ("query", "contexts", "prompt")))
    except RowError:  # the other row tells it
        return row, {}
    control: Row = {}
    for column in columns:
        side = SWAPPED[column]
        if another[side]:
            sides = {**own, side: shuffled[side]}
            control[column] = measure(column, image, **sides, judge=job.judge, encoder=job.encoder)
    return row, control


def _counts(rows: list[Row]) -> dict[str, Any]:
    failed = [row for row in rows if row.get("error_code")]
    ids, bad = {row[ID] for row in rows}, {row[ID] for row in failed}
    codes = dict(Counter(row["error_code"] for row in failed))
    return {"rows": len(ids), "ok": len(ids - bad), "failed": len(bad), "images": len(rows) - len(failed), "codes": codes}


def _statistics(rows: list[Row], controls: list[Row], columns: list[str]) -> dict[str, Row]:
    """Of each score: how many have it, mean, the control's mean, and how often a true one is above a shuffled one."""
    told = {}
    for column in columns:
        true, false = (np.array([r[column] for r in of if r.get(column) is not None]) for of in (rows, controls))
        mean = {"mean": float(true.mean()) if len(true) else None, "shuffled": float(false.mean()) if len(false) else None}
        told[column] = {"count": len(true), **mean, "auc": auc(true, false) if len(true) and len(false) else None}
    return told
