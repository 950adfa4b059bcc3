"""The third stage: turn a shard's rows into requests, and an engine's outcomes into rows."""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Control, EngineStats, Failure, Request, Result
from context_diffusion.core.schema import (
    ID,
    MADE,
    NEGATIVE_PROMPT,
    PROMPT,
    from_image,
    known_rows,
    required,
    to_image,
    with_span,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.sweep import Matrix, images_of

Made = tuple[Request | None, Result | Failure | None]  # None: the row failed before it reached the engine


class Engine(Protocol):
    """What generates images. `generate` may be called from several threads at once."""

    def generate(self, requests: list[Request]) -> list[Result | Failure]: ...


@runtime_checkable
class Watched(Protocol):
    """An engine that reports its statistics."""

    def stats(self) -> EngineStats: ...


class ShardEngine(Protocol):
    """Generates the images of one shard, given by row. Outcomes are returned flat, in the order of the
    requests."""

    def generate_shard(self, shard: int, rows: list[list[Request]]) -> list[Result | Failure]: ...


def requests_of(table: pa.Table, control_kinds: list[str], matrix: Matrix) -> list[list[Request]]:
    """Return the requests of each row: none for a failed row, else num_images for each combination of the
    matrix."""
    return [
        [] if row["error_code"] is not None else _requests(row, control_kinds, matrix)
        for row in known_rows(table)
    ]


def _requests(row: dict[str, Any], control_kinds: list[str], matrix: Matrix) -> list[Request]:
    query = required(row["query_image"])
    controls = tuple(map(Control, control_kinds, map(from_image, row["control_images"])))
    contexts = tuple(required(context) for context in row["context_images"])
    masks = tuple(required(mask) for mask in row["mask_images"])
    prompts = row[PROMPT], row[NEGATIVE_PROMPT]
    size = row["output_width"], row["output_height"]
    return [
        Request(row[ID], index, query, controls, contexts, *prompts, settings, size, masks)
        for index, settings in enumerate(images_of(Settings.from_trusted_json(row["settings"]), matrix))
    ]


def generate(table: pa.Table, engine: ShardEngine, job: GenerateJob) -> pa.Table:
    """Generate the images of a shard. Returns one row per image, and one per failed row."""
    began = time.time()
    requests_by_row = requests_of(table, job.control_kinds, job.matrix)
    outcomes = iter(engine.generate_shard(table["shard"][0].as_py(), requests_by_row))
    rows: list[int] = []
    index: list[int] = []
    results: list[Made] = []
    for number, requests in enumerate(requests_by_row):
        of_row: list[Made] = [(request, next(outcomes)) for request in requests]
        failed = [(request, outcome) for request, outcome in of_row if isinstance(outcome, Failure)]
        written = failed[:1] or of_row or [(None, None)]  # a row with one failed image is one failed row
        rows += [number] * len(written)
        index += range(len(written))
        results += written
    return with_span(_with_results(table.take(pa.array(rows, pa.int64())), index, results), "generate", began)


def _with_results(table: pa.Table, index: list[int], results: list[Made]) -> pa.Table:
    """Add the MADE columns, each image's own settings, and the errors of failed images."""
    outcomes = [outcome for _, outcome in results]
    changed = {
        "settings": [request and request.settings.model_dump_json() for request, _ in results],
        "error_code": [str(outcome.code) if isinstance(outcome, Failure) else None for outcome in outcomes],
        "error_message": [outcome.message if isinstance(outcome, Failure) else None for outcome in outcomes],
    }
    for name, values in changed.items():
        column = pc.coalesce(pa.array(values, pa.string()), table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    finished = [outcome if isinstance(outcome, Result) else None for outcome in outcomes]
    columns = {
        "index": index,
        "made_image": [to_image(result.image) if result else None for result in finished],
    }
    for name in set(MADE.names) - set(columns):
        columns[name] = [getattr(result, name) if result else None for result in finished]
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, MADE.field(name).type))
    return table
