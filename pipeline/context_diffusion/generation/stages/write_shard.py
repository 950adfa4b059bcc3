"""The last stage: write a shard's images, then its part. Knows no Ray."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.schema import (
    CONTROL_SETTINGS,
    COUNTED,
    FAILURES_TOLD,
    HUGGING_FACE,
    ID,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    SETTING_TYPES,
    SOURCE_LISTS,
    STAGES,
    WRITTEN,
    columns_of,
    from_image,
    known_rows,
    required,
    span,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.uris import relative
from context_diffusion.evaluation.scores import best_of, is_flagged, measure
from context_diffusion.inputs.decode import resize
from context_diffusion.inputs.image_sources import INLINE
from context_diffusion.outputs.encode import encode_image
from context_diffusion.outputs.image_files import existing_images, image_name, store_images
from context_diffusion.outputs.image_metadata import metadata_texts
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet


@dataclass(frozen=True)
class WriteShard:
    """Encodes and creates a shard's images, then its part. Files that exist already are kept: the first
    writer wins.

    model: name@revision; base: the folder of the first manifest file; redo: shards of which only the failed
    rows are in the flow (--retry-failed), and whose other rows are kept."""

    job: GenerateJob
    output: Output
    model: str
    base: str
    redo: frozenset[int] = frozenset()

    def __call__(self, table: pa.Table) -> pa.Table:
        began = time.time()
        shard = table["shard"][0].as_py()
        flow_rows = [row | self._scores(row) for row in known_rows(table)]
        selected = self._selected(shard, flow_rows)
        rows_and_images = [self._row(flow_rows[number]) for number in selected]
        rows = [row for row, _ in rows_and_images]
        images = [image for _, image in rows_and_images]
        store_images(self.output, self.job, shard, rows, images)
        part = self._part(table, selected, rows)
        if shard in self.redo:
            part = _merged(self.output.read_part(shard), part)
        write = self.output.storage.replace if shard in self.redo else self.output.storage.create
        data = to_parquet(part, ("image",))
        write(self.output.part(shard), data)
        files = [] if self.job.images_in == "parquet" else [image for image in images if image]
        size = len(data) + sum(map(len, files))
        return pa.Table.from_pylist(
            [_written(shard, part, table, size) | {"write_span": span(began)}], WRITTEN
        )

    def _selected(self, shard: int, rows: list[dict[str, Any]]) -> list[int]:
        """Return the numbers of the rows that are written: all, or with `keep: best` the best image of each
        row.

        An image that an earlier attempt wrote is preferred, and an unsafe one is written only where all are
        unsafe."""
        if self.job.keep == "all":
            return list(range(len(rows)))
        columns = columns_of(self.job.score)
        existing = existing_images(self.output, self.job, shard)
        selected = []
        for _, group in groupby(range(len(rows)), key=lambda number: rows[number][ID]):
            numbers = list(group)
            written = [number for number in numbers if image_name(self.job, rows[number]) in existing]
            safe = [number for number in numbers if not rows[number]["unsafe"]]
            candidates = written or safe or numbers
            selected.append(candidates[best_of([rows[number] for number in candidates], columns)])
        return selected

    def _part(self, table: pa.Table, selected: list[int], rows: list[dict[str, Any]]) -> pa.Table:
        columns = {
            field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in OUTPUT
        }
        for name in table.column_names:
            if name.startswith(PASSED):
                columns[name.removeprefix(PASSED)] = (
                    table[name].combine_chunks().take(pa.array(selected, pa.int64()))
                )
        part = pa.table(columns)
        if self.job.images_in in ("parquet", "both"):
            return part.replace_schema_metadata(HUGGING_FACE)
        return part.drop_columns(["image"])

    def _row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """Convert a row of the flow to a row of the part and its image file."""
        written: dict[str, Any] = {
            **{name: row.get(name) for name in OUTPUT.names if name in row},
            **_setting_columns(row["settings"], len(self.job.control_kinds)),
            "status": "failed" if row["error_code"] else "ok",
            QUERY: _label(row[QUERY], self.base),
            **{name: _labels(row[name], self.base) for name in SOURCE_LISTS},
            "control": "+".join(self.job.control_kinds) or "disabled",
            "fit": self.job.fit,
            "model": self.model,
            "created_at": datetime.now(UTC),
        }
        image = from_image(row["made_image"])
        if image is None:
            return written, None
        written |= {"height": image.shape[0], "width": image.shape[1]}
        parts = self.job.model if isinstance(self.job.model, Parts) else None
        texts = metadata_texts(written, row, parts) if self.job.metadata else {}
        return written, encode_image(image, self.job.file_format, texts)

    def _scores(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the score columns of a row of the flow and whether it is flagged; null for a failed row."""
        columns = columns_of(self.job.score)
        image = from_image(row["made_image"])
        if not columns or image is None:
            return dict.fromkeys(columns)
        contexts = [required(context) for context in row["context_images"]]
        query = resize(required(row["query_image"]), image.shape[1], image.shape[0], self.job.fit)
        prompt = row[PROMPT]
        scores = {column: measure(column, image, query, contexts, prompt) for column in columns}
        return scores | {"flagged": is_flagged(scores, self.job.thresholds)}


def _setting_columns(text: str | None, networks: int) -> dict[str, Any]:
    """Return the SETTING_TYPES columns of a row's settings, with the values that were used where one was left
    out. networks: ControlNets that run."""
    if not text:
        return {}
    settings = Settings.from_trusted_json(text)
    columns = settings.model_dump(include=set(SETTING_TYPES))
    for name in CONTROL_SETTINGS:
        value = columns[name]
        columns[name] = value if isinstance(value, list) else [value] * max(networks, 1)
    if not isinstance(settings.context_blocks, str):
        columns["context_blocks"] = json.dumps(settings.context_blocks, sort_keys=True)
    if settings.context_guidance_scale is None:
        columns["context_guidance_scale"] = settings.guidance_scale
    return columns


def _merged(old: pa.Table, new: pa.Table) -> pa.Table:
    """Replace the rows of a part that were generated again, in the old order."""
    place_of = {row_id: number for number, row_id in enumerate(dict.fromkeys(old[ID].to_pylist()))}
    unchanged = old.filter(pc.invert(pc.is_in(old[ID], new[ID].combine_chunks())))
    both = pa.concat_tables([unchanged, new.cast(unchanged.schema)])
    order = sorted(
        range(len(both)), key=lambda row: (place_of[both[ID][row].as_py()], both["index"][row].as_py())
    )
    return both.take(pa.array(order, pa.int64()))


def _written(shard: int, part: pa.Table, table: pa.Table, size: int) -> dict[str, Any]:
    """Return the WRITTEN row of a shard, without the span of its writing."""
    failed = part.filter(pc.equal(part["status"], "failed"))
    codes = Counter(failed["error_code"].to_pylist())
    failures = failed.select([ID, "error_code", "error_message"]).rename_columns([ID, "code", "message"])
    return {
        "shard": shard,
        "rows": len(part[ID].unique()),
        "failed": len(failed[ID].unique()),
        "images": len(part) - len(failed),
        "rows_made": len(table[ID].unique()),
        "images_made": table["error_code"].null_count,
        "bytes": size,
        "codes": list(codes.items()),
        "failures": failures.slice(0, FAILURES_TOLD).to_pylist(),
        **{f"{stage}_span": table[f"{stage}_span"][0].as_py() for stage in STAGES if stage != "write"},
        **{name: sum(filter(None, table[name].to_pylist())) for name in COUNTED},
    }


def _label(source: dict[str, Any] | None, base: str) -> str | None:
    """Return how the output names a source: its URI, relative to the manifest for a local file, or INLINE for
    bytes."""
    if source is None:
        return None
    path = relative(source["path"], base) if source["path"] else None
    return f"./{path}" if path == INLINE else path or INLINE


def _labels(sources: list[dict[str, Any]] | None, base: str) -> list[str | None] | None:
    return None if sources is None else [_label(source, base) for source in sources]
