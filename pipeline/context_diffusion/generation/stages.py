"""The stages of the flow as plain callables, each from one shard's table to the next. Nothing here knows Ray.

ReadShards -> load_images -> generate (around an engine) -> WriteShard (generation/write_shard.py)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_base import Fit
from context_diffusion.core.records import Control, EngineStats, Failure, Pixels, Request, Result, Shard
from context_diffusion.core.schema import (
    CONTEXT,
    CONTROL_IMAGE,
    ID,
    LOADED,
    MADE,
    NEGATIVE_PROMPT,
    PROMPT,
    QUERY,
    SPAN,
    known_rows,
    required,
    to_image,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.sweep import images_of
from context_diffusion.core.uris import parent
from context_diffusion.inputs.context_images import ContextPreprocessing
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.inputs.decode import Size, decode_resized, output_size, statistics
from context_diffusion.inputs.image_sources import ImageSource, read_bytes
from context_diffusion.inputs.manifest_files import ManifestFile, Row, read_parquet, read_text, rows_of
from context_diffusion.inputs.rows import column_names, read_table
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.content_cache import ContentCache
from context_diffusion.storage.filesystem import Storage

IMAGE_CACHE = ContentCache(64 * 2**20)  # pictures of this process, whatever shards it loads
Seen = dict[tuple[str, Hashable], Pixels]
Made = tuple[Request | None, Result | Failure | None]  # None: the row failed before it came to the engine


class Engine(Protocol):
    """The seam: whoever makes pictures. `generate` may be called from several threads at once."""

    def generate(self, requests: list[Request]) -> list[Result | Failure]: ...


@runtime_checkable
class Watched(Protocol):
    """An engine that tells of itself."""

    def stats(self) -> EngineStats: ...


class ShardEngine(Protocol):
    """Makes the images of a shard, given by row; the outcomes come flat and in order."""

    def generate_shard(self, shard: int, rows: list[list[Request]]) -> list[Result | Failure]: ...


@dataclass(frozen=True)
class ReadShard:
    """One read task: a shard's rows as one table. (A task of several shards would become one block.)"""

    job: GenerateJob
    file: ManifestFile
    shard: Shard
    passed: pa.Schema
    storage: Storage
    redo: Output | None = None  # --retry-failed: only the rows that failed in the shard's part there

    def __call__(self) -> list[pa.Table]:
        source, rows = None, list[Row]()
        if self.file.format == "parquet":
            source = read_parquet(self.file, self.shard, self.storage)
            names = column_names(self.job)
            known = [name for name in source.column_names if name in names.values()]
            rows = rows_of(source.select(known) if names[ID] in known else source)  # a derived id is of the whole row
        else:
            rows = read_text(self.file, self.shard, self.storage)
        part = self.redo.read_part(self.shard.number, [ID, "status"]) if self.redo else None
        ids = list(dict.fromkeys(part[ID].to_pylist())) if part is not None else None
        table = read_table(rows, self.shard.number, self.job, parent(self.file.uri), self.passed, source, ids)
        if part is not None:
            failed = part.filter(pc.equal(part["status"], "failed"))[ID].combine_chunks()
            table = table.filter(pc.is_in(table[ID], failed))
        return [table] if len(table) else []  # none: another run was here first, or Ray reads once more what it made


@dataclass(frozen=True)
class LoadImages:
    """Sources -> pixels at the sizes that the model takes, and the control map."""

    job: GenerateJob
    allow: list[str]
    image_size: int
    preprocessing: ContextPreprocessing  # of contexts
    storage: Storage

    def __call__(self, table: pa.Table) -> pa.Table:
        began, seen = time.time(), Seen()
        rows, codes, messages = [], [], []
        for row in known_rows(table):
            loaded: dict[str, Any] = dict.fromkeys(LOADED.names)
            code, message = row["error_code"], row["error_message"]
            if code is None:
                try:
                    loaded = self._load(row, seen)
                except RowError as error:
                    code, message = str(error.code), error.message
            rows.append(loaded)
            codes.append(code)
            messages.append(message)
        for name, values in (("error_code", codes), ("error_message", messages)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.string()))
        for name, values in ((n, table[n]) for n in (QUERY, CONTEXT, CONTROL_IMAGE)):
            table = table.set_column(table.column_names.index(name), name, _without_bytes(values))
        for name in LOADED.names:
            table = table.append_column(name, pa.array([row[name] for row in rows], LOADED.field(name).type))
        return _with_span(table, "load", began)

    def _load(self, row: dict[str, Any], seen: Seen) -> dict[str, Any]:
        settings = Settings.model_validate_json(row["settings"])
        query = self._resized(row[QUERY], self.job.fit, settings.width, settings.height, seen)
        contexts = [self._context(source, seen) for source in row[CONTEXT]]
        mean, std = statistics(query)
        return {
            "query_image": to_image(query),
            "control_images": [to_image(control.pixels) for control in self._controls(row, query, seen)],
            "context_images": [to_image(context) for context in contexts],
            "query_mean": mean,
            "query_std": std,
        }

    def _controls(self, row: dict[str, Any], query: Pixels, seen: Seen) -> tuple[Control, ...]:
        """Maps that the row brings, or those made of its query."""
        kinds = self.job.control_kinds
        if not kinds or not row[CONTROL_IMAGE]:
            return controls_of(query, kinds)
        if len(row[CONTROL_IMAGE]) != len(kinds):
            message = f"{CONTROL_IMAGE} has {len(row[CONTROL_IMAGE])} pictures, the job's control {len(kinds)} kinds"
            raise RowError(ErrorCode.INVALID_SETTING, message)
        height, width = query.shape[:2]
        maps = [self._resized(source, self.job.fit, width, height, seen) for source in row[CONTROL_IMAGE]]
        return tuple(map(Control, kinds, maps))

    def _resized(self, source: ImageSource, fit: Fit, width: int | None, height: int | None, seen: Seen) -> Pixels:
        def size(wide: int, tall: int) -> Size:
            return output_size(fit, wide, tall, width, height, self.image_size)

        def decode(data: bytes, name: str) -> Pixels:
            return decode_resized(data, self.job.limits, name, size, fit)

        return self._loaded(source, (fit, width, height, self.image_size), decode, seen)

    def _context(self, source: ImageSource, seen: Seen) -> Pixels:
        def decode(data: bytes, name: str) -> Pixels:
            return self.preprocessing.decode(data, self.job.limits, name)

        return self._loaded(source, self.preprocessing, decode, seen)

    def _loaded(self, source: ImageSource, way: Hashable, decode: Callable[[bytes, str], Pixels], seen: Seen) -> Pixels:
        """Sources repeat over rows: the small pixels of a URI are kept for the shard's other rows. way: what `decode` depends
        on."""
        key = (source["path"], way)
        if source["bytes"] is None and key in seen:
            return seen[key]
        data = read_bytes(source, self.allow, self.job.limits, self.storage)
        name = source["path"] or "inline image"
        pixels = IMAGE_CACHE.get(data, (way, self.job.limits.max_pixels), lambda: decode(data, name))
        if source["bytes"] is None:
            seen[key] = pixels
        return pixels


def _without_bytes(column: pa.ChunkedArray) -> pa.Array:
    """Sources with their bytes dropped: they are pixels now."""
    strip = [
        [{**item, "bytes": None} for item in value] if isinstance(value, list) else value and {**value, "bytes": None}
        for value in column.to_pylist()
    ]
    return pa.array(strip, column.type)


def _with_span(table: pa.Table, stage: str, began: float) -> pa.Table:
    """The shard's time in a stage that ends now."""
    return table.append_column(f"{stage}_span", pa.array([span(began)] * len(table), SPAN))


def span(began: float) -> dict[str, float]:
    """From `began`, by time.time(), to now."""
    return {"began": began, "seconds": max(time.time() - began, 0.0)}  # a clock may be set back


def requests_of(table: pa.Table, job: GenerateJob) -> list[list[Request]]:
    """The images to make of each row: none for a failed one, num_images at each combination of the matrix for the others."""
    wanted: list[list[Request]] = []
    for row in known_rows(table):
        wanted.append([])
        if row["error_code"] is not None:
            continue
        settings = Settings.model_validate_json(row["settings"])
        contexts = tuple(required(context) for context in row["context_images"])
        for index, own in enumerate(images_of(settings, job.matrix)):
            wanted[-1].append(
                Request(
                    row[ID],
                    index,
                    required(row["query_image"]),
                    tuple(map(Control, job.control_kinds, map(required, row["control_images"]))),
                    contexts,
                    row[PROMPT],
                    row[NEGATIVE_PROMPT],
                    own,
                )
            )
    return wanted


def generate(table: pa.Table, engine: ShardEngine, job: GenerateJob) -> pa.Table:
    """Hands a shard's rows to the engine and waits for them: a row for each image, and one for each failed row."""
    began, wanted = time.time(), requests_of(table, job)
    outcomes = iter(engine.generate_shard(table["shard"][0].as_py(), wanted))
    rows: list[int] = []
    index: list[int] = []
    made: list[Made] = []
    for number, requests in enumerate(wanted):
        results: list[Made] = [(request, next(outcomes)) for request in requests]
        failed = [(request, result) for request, result in results if isinstance(result, Failure)]
        kept = failed[:1] or results or [(None, None)]  # a row that failed once is one failed row
        rows += [number] * len(kept)
        index += range(len(kept))
        made += kept
    return _with_span(_with_made(table.take(pa.array(rows, pa.int64())), index, made), "generate", began)


def _with_made(table: pa.Table, index: list[int], made: list[Made]) -> pa.Table:
    outcomes = [outcome for _, outcome in made]
    changed = {
        "settings": [request and request.settings.model_dump_json() for request, _ in made],  # the image's own
        "error_code": [str(o.code) if isinstance(o, Failure) else None for o in outcomes],
        "error_message": [o.message if isinstance(o, Failure) else None for o in outcomes],
    }
    for name, values in changed.items():
        new = pc.coalesce(pa.array(values, pa.string()), table[name])
        table = table.set_column(table.column_names.index(name), name, new)
    results = [o if isinstance(o, Result) else None for o in outcomes]
    columns = {"index": index, "made_image": [to_image(r.image) if r else None for r in results]}
    for name in set(MADE.names) - set(columns):
        columns[name] = [getattr(r, name) if r else None for r in results]
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, MADE.field(name).type))
    return table
