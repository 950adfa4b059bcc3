"""The last stage: a shard's images, then its part. Nothing here knows Ray."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.schema import (
    CONTEXT,
    CONTROL_IMAGE,
    COUNTED,
    FAILURES_TOLD,
    HUGGING_FACE,
    ID,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    SETTING_TYPES,
    STAGES,
    WRITTEN,
    columns_of,
    from_image,
    known_rows,
    required,
)
from context_diffusion.core.settings import Settings
from context_diffusion.core.uris import relative
from context_diffusion.evaluation.scores import best_of, is_flagged, measure
from context_diffusion.generation.stages import span
from context_diffusion.inputs.image_sources import INLINE
from context_diffusion.outputs.encode import encode_image
from context_diffusion.outputs.image_files import picture_name, place, standing
from context_diffusion.outputs.image_metadata import metadata_of
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.parquet_files import to_parquet


@dataclass(frozen=True)
class WriteShard:
    """Encodes and creates a shard's images, then its part. What is there already stays: the first committer wins."""

    job: GenerateJob
    output: Output
    model: str
    base: str  # the first manifest file's folder
    redo: frozenset[int] = frozenset()  # --retry-failed: of these shards only the failed rows are in the flow; the others stay

    def __call__(self, table: pa.Table) -> pa.Table:
        began, shard = time.time(), table["shard"][0].as_py()
        flow = [row | self._scores(row) for row in known_rows(table)]
        kept = self._kept(shard, flow)
        made = [self._row(flow[number]) for number in kept]
        rows, pictures = [row for row, _ in made], [picture for _, picture in made]
        place(self.output, self.job, shard, rows, pictures)
        part = self._part(table, kept, rows)
        if shard in self.redo:
            part = _over(self.output.read_part(shard), part)
        put = self.output.storage.replace if shard in self.redo else self.output.storage.create
        data = to_parquet(part, ("image",))
        put(self.output.part(shard), data)
        apart = [] if self.job.pictures_in == "parquet" else [picture for picture in pictures if picture]
        size = len(data) + sum(map(len, apart))
        return pa.Table.from_pylist([_written(shard, part, table, size) | {"write_span": span(began)}], WRITTEN)

    def _kept(self, shard: int, rows: list[dict[str, Any]]) -> list[int]:
        """The numbers of the rows of the flow that are written: all, or of each row's images the best. What an earlier
        attempt left is kept, and one that is unsafe only where all are."""
        if self.job.keep == "all":
            return list(range(len(rows)))
        columns, earlier = columns_of(self.job.score), standing(self.output, self.job, shard)
        kept = []
        for _, group in groupby(range(len(rows)), key=lambda number: rows[number][ID]):
            images = list(group)
            left = [number for number in images if picture_name(self.job, rows[number]) in earlier]
            safe = [number for number in images if not rows[number]["unsafe"]]
            among = left or safe or images
            kept.append(among[best_of([rows[number] for number in among], columns)])
        return kept

    def _part(self, table: pa.Table, kept: list[int], rows: list[dict[str, Any]]) -> pa.Table:
        columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in OUTPUT}
        for name in table.column_names:
            if name.startswith(PASSED):
                columns[name.removeprefix(PASSED)] = table[name].combine_chunks().take(pa.array(kept, pa.int64()))
        part = pa.table(columns)
        if self.job.pictures_in in ("parquet", "both"):
            return part.replace_schema_metadata(HUGGING_FACE)
        return part.drop_columns(["image"])

    def _row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """A row of the flow -> a row of the part and its picture's file."""
        settings = Settings.model_validate_json(row["settings"]) if row["settings"] else None
        used = settings.model_dump(include=set(SETTING_TYPES)) if settings else {}
        if settings and not isinstance(settings.controlnet_conditioning_scale, list):
            used["controlnet_conditioning_scale"] = [settings.controlnet_conditioning_scale]
        if settings and settings.context_guidance_scale is None:
            used["context_guidance_scale"] = settings.guidance_scale
        written: dict[str, Any] = {
            **{name: row.get(name) for name in OUTPUT.names if name in row},
            **used,
            "status": "failed" if row["error_code"] else "ok",
            QUERY: _label(row[QUERY], self.base),
            **{n: None if row[n] is None else [_label(source, self.base) for source in row[n]] for n in (CONTEXT, CONTROL_IMAGE)},
            "control": "+".join(self.job.control_kinds) or "disabled",
            "fit": self.job.fit,
            "model": self.model,
            "created_at": datetime.now(UTC),
        }
        if (image := from_image(row["made_image"])) is None:
            return written, None
        written |= {"height": image.shape[0], "width": image.shape[1]}
        return written, encode_image(image, self.job.picture_format, metadata_of(written, row, self.job))

    def _scores(self, row: dict[str, Any]) -> dict[str, Any]:
        """The score columns of a row of the flow, and whether it is flagged; none of a failed row."""
        columns = columns_of(self.job.score)
        if not columns or (image := from_image(row["made_image"])) is None:
            return dict.fromkeys(columns)
        contexts = [required(context) for context in row["context_images"]]
        query, prompt = required(row["query_image"]), row[PROMPT]
        scores = {column: measure(column, image, query, contexts, prompt) for column in columns}
        return scores | {"flagged": is_flagged(scores, self.job.thresholds)}


def _over(old: pa.Table, new: pa.Table) -> pa.Table:
    """A part with some of its rows made anew, in the old order."""
    place = {row_id: number for number, row_id in enumerate(dict.fromkeys(old[ID].to_pylist()))}
    kept = old.filter(pc.invert(pc.is_in(old[ID], new[ID].combine_chunks())))
    both = pa.concat_tables([kept, new.cast(kept.schema)])
    order = sorted(range(len(both)), key=lambda row: (place[both[ID][row].as_py()], both["index"][row].as_py()))
    return both.take(pa.array(order, pa.int64()))


def _written(shard: int, part: pa.Table, table: pa.Table, size: int) -> dict[str, Any]:
    failed = part.filter(pc.equal(part["status"], "failed"))
    codes = Counter(failed["error_code"].to_pylist())
    told = failed.select([ID, "error_code", "error_message"]).rename_columns([ID, "code", "message"])
    return {
        "shard": shard,
        "rows": len(part[ID].unique()),
        "failed": len(failed[ID].unique()),
        "images": len(part) - len(failed),
        "rows_made": len(table[ID].unique()),
        "images_made": table["error_code"].null_count,
        "bytes": size,
        "codes": list(codes.items()),
        "failures": told.slice(0, FAILURES_TOLD).to_pylist(),
        **{f"{stage}_span": table[f"{stage}_span"][0].as_py() for stage in STAGES if stage != "write"},
        **{name: sum(filter(None, table[name].to_pylist())) for name in COUNTED},
    }


def _label(source: dict[str, Any] | None, base: str) -> str | None:
    """How the output names a source: its URI, a local file's relative to the manifest; inline images have none."""
    if source is None:
        return None
    path = relative(source["path"], base) if source["path"] else None
    return f"./{path}" if path == INLINE else path or INLINE
