"""Runs the evaluate job in this process: scores of finished images and of their shuffled controls."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from context_diffusion.core.errors import EXIT_OK, EXIT_ROWS_FAILED, JobError, OutputConflictError, RowError
from context_diffusion.core.evaluate_job import EvaluateJob
from context_diffusion.core.job_base import Fit, Limits
from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import ID, SCORES, columns_of
from context_diffusion.core.uris import normal
from context_diffusion.evaluation.compare import compared
from context_diffusion.evaluation.distances import References, reference_sources
from context_diffusion.evaluation.pairs import Pair, find_pairs, scored_images, source_key
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
    """Write scores.parquet, summary.json and the comparison.

    Returns the summary with `exit`. Raises JobError.
    """
    started = time.perf_counter()
    storage = Storage(job.storage_options)
    output = Output(normal(job.output), storage)
    if storage.exists(output.plan):
        raise OutputConflictError(f"output: {output.root} is a generate job's OUTPUT; choose another folder")
    _load_models(job)
    pairs, allow = find_pairs(job, storage)
    baseline, baseline_allow = _baseline_pairs(job, pairs, storage)
    folders = [normal(folder) for folder in (job.images, job.compare, job.reference) if folder]
    loader = _Loader(job.limits, [*allow, *baseline_allow, *folders], storage)
    references = None
    if _has_references(job):
        references = References(job, reference_sources(job, pairs, storage), loader.pixels)
    scored = [
        _score(pair, partners, loader, job) for pair, partners in zip(pairs, others(pairs), strict=True)
    ]
    rows = [row for row, _ in scored]
    controls = [control for _, control in scored]
    storage.replace(f"{output.root}/scores.parquet", to_parquet(pa.Table.from_pylist(rows, SCORES)))
    statistics = _statistics(rows, controls, columns_of(job.score))
    summary = {"output": output.root, **_counts(rows), "scores": statistics}
    if references:
        summary["distances"] = references.distances(pairs)
    if job.compare:
        summary["compare"] = _compare(job, output, rows, baseline, loader, references)
    seconds = time.perf_counter() - started
    images_per_second = round(summary["images"] / seconds, 3)
    summary |= {"skipped": 0, "seconds": round(seconds, 2), "images_per_second": images_per_second}
    failed = summary["failed"] or summary.get("compare", summary)["failed"]
    summary["exit"] = EXIT_ROWS_FAILED if failed else EXIT_OK
    storage.replace(output.summary, json.dumps(summary | {"of": job.images}, indent=2).encode())
    return summary


def _load_models(job: EvaluateJob) -> None:
    """Load the models that the job needs, so that an invalid one fails before any image is scored."""
    if "prompt" in job.score:
        from context_diffusion.evaluation.prompt import load_judge  # imports torch

        load_judge(job.judge)
    if "similarity" in job.score or _has_references(job):
        from context_diffusion.evaluation.similarity import load_embedding  # imports torch

        load_embedding(job.encoder)


def _has_references(job: EvaluateJob) -> bool:
    return "reference" in job.columns or job.reference is not None


def _baseline_pairs(job: EvaluateJob, pairs: list[Pair], storage: Storage) -> tuple[list[Pair], list[str]]:
    """Return the pairs and URI prefixes of the system in `compare`.

    Raises JobError if it shares no row with `images`.
    """
    if not job.compare:
        return [], []
    baseline, allow = find_pairs(job.model_copy(update={"images": job.compare}), storage)
    if not {pair.id for pair in pairs} & {pair.id for pair in baseline if scored_images([pair])}:
        example = repr(pairs[0].id)
        raise JobError(f"compare: {job.compare} has none of the rows of {job.images}, such as {example}")
    return baseline, allow


def _compare(
    job: EvaluateJob,
    output: Output,
    rows: list[Row],
    baseline: list[Pair],
    loader: _Loader,
    references: References | None,
) -> Row:
    """Write the scores of the other system to compare.parquet. Returns the comparison for summary.json."""
    baseline_rows = [_score(pair, {}, loader, job)[0] for pair in baseline]
    data = to_parquet(pa.Table.from_pylist(baseline_rows, SCORES))
    output.storage.replace(f"{output.root}/compare.parquet", data)
    statistics = compared(rows, baseline_rows, columns_of(job.score))
    summary = {"of": job.compare, **_counts(baseline_rows), "scores": statistics}
    return summary | {"distances": references.distances(baseline)} if references else summary


@dataclass
class _Loader:
    """Loads sources as pixels. Contexts repeat over rows, so the last resized images are cached."""

    limits: Limits
    allow: list[str]
    storage: Storage
    cache: dict[Hashable, Pixels] = field(default_factory=dict)

    def pixels(self, source: ImageSource) -> Pixels:
        """Return a source at its own size. Raises RowError."""
        return read_pixels(source, self.allow, self.limits, self.storage)

    def resized(self, source: ImageSource, image: Pixels, fit: Fit) -> Pixels:
        """Return a source at the size of the image. Raises RowError."""
        key = (source_key(source), image.shape, fit)
        if key not in self.cache:
            pixels = resize(self.pixels(source), image.shape[1], image.shape[0], fit)
            if len(self.cache) == CACHED_IMAGES:
                del self.cache[next(iter(self.cache))]
            self.cache[key] = pixels
        return self.cache[key]

    def inputs(self, image: Pixels, query: Pair, contexts: Pair, prompt: Pair) -> dict[str, Any]:
        """Return the inputs that an image is scored against, each from the given pair. Raises RowError."""
        return {
            "query": self.resized(query.query, image, query.fit),
            "contexts": [self.resized(source, image, "crop") for source in contexts.contexts],
            "prompt": prompt.prompt,
        }


def _score(
    pair: Pair, partners: dict[str, Pair | None], loader: _Loader, job: EvaluateJob
) -> tuple[Row, Row]:
    """Return the row of scores.parquet and the scores of the shuffled control; empty without partners."""
    row: Row = {ID: pair.id, "index": pair.index}
    if pair.error:
        code, message = pair.error
        return row | {"error_code": code, "error_message": message}, {}
    assert pair.image is not None
    try:
        image = loader.pixels(pair.image)
        inputs = loader.inputs(image, pair, pair, pair)
    except RowError as error:
        return row | {"error_code": str(error.code), "error_message": error.message}, {}
    for column in columns_of(job.score):
        row[column] = measure(column, image, **inputs, judge=job.judge, encoder=job.encoder)
    return row, _score_control(image, inputs, pair, partners, loader, job) if partners else {}


def _score_control(
    image: Pixels,
    inputs: dict[str, Any],
    pair: Pair,
    partners: dict[str, Pair | None],
    loader: _Loader,
    job: EvaluateJob,
) -> Row:
    """Score an image with one input replaced by that of a partner. Columns without a partner are omitted."""
    try:
        shuffled = loader.inputs(image, *(partners[name] or pair for name in ("query", "contexts", "prompt")))
    except RowError:  # it is reported with the partner's own row
        return {}
    control: Row = {}
    for column in columns_of(job.score):
        name = SWAPPED[column]
        if partners[name]:
            swapped = {**inputs, name: shuffled[name]}
            control[column] = measure(column, image, **swapped, judge=job.judge, encoder=job.encoder)
    return control


def _counts(rows: list[Row]) -> dict[str, Any]:
    """Count rows by id, images and error codes."""
    failed = [row for row in rows if row.get("error_code")]
    ids = {row[ID] for row in rows}
    failed_ids = {row[ID] for row in failed}
    return {
        "rows": len(ids),
        "ok": len(ids - failed_ids),
        "failed": len(failed_ids),
        "images": len(rows) - len(failed),
        "codes": dict(Counter(row["error_code"] for row in failed)),
    }


def _statistics(rows: list[Row], controls: list[Row], columns: list[str]) -> dict[str, Row]:
    """Return for each score the number of images, the mean, the mean of the shuffled controls and the AUC."""
    statistics: dict[str, Row] = {}
    for column in columns:
        true = _values(rows, column)
        shuffled = _values(controls, column)
        statistics[column] = {
            "count": len(true),
            "mean": float(true.mean()) if len(true) else None,
            "shuffled": float(shuffled.mean()) if len(shuffled) else None,
            "auc": auc(true, shuffled) if len(true) and len(shuffled) else None,
        }
    return statistics


def _values(rows: list[Row], column: str) -> NDArray[np.float64]:
    return np.array([row[column] for row in rows if row.get(column) is not None])
