"""The last stage: a shard's images, then its part. Nothing here knows Ray."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from context_diffusion.config import GenerateJob, Settings
from context_diffusion.encoding import encode_image
from context_diffusion.evaluation.scores import columns_of, measure
from context_diffusion.output import Output, to_parquet
from context_diffusion.placing import place
from context_diffusion.recipe import metadata_of
from context_diffusion.schema import (
    CONTEXT,
    CONTROL_IMAGE,
    COUNTED,
    HUGGING_FACE,
    ID,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    SETTING_TYPES,
    Pixels,
    from_image,
    required,
)


@dataclass(frozen=True)
class WriteShard:
    """Encodes and creates a shard's images, then its part. What is there already stays: the first committer wins."""

    job: GenerateJob
    output: Output
    model: str
    redo: bool = False  # --retry-failed: the table holds rows that failed; the part is replaced, its other rows stay

    def __call__(self, table: pa.Table) -> pa.Table:
        shard = table["shard"][0].as_py()
        made = [self._row(row) for row in table.to_pylist()]
        rows, pictures = [row for row, _ in made], [picture for _, picture in made]
        place(self.output, self.job, shard, rows, pictures)
        part = self._part(table, rows)
        if self.redo:
            part = _over(self.output.read_part(shard), part)
        put = self.output.storage.replace if self.redo else self.output.storage.create
        put(self.output.part(shard), to_parquet(part, ("image",)))
        return _counts(shard, part, table)

    def _part(self, table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
        columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in OUTPUT}
        for name in table.column_names:
            if name.startswith(PASSED):
                columns[name.removeprefix(PASSED)] = table[name].combine_chunks()
        part = pa.table(columns)
        if self.job.pictures_in in ("parquet", "both"):
            return part.replace_schema_metadata(HUGGING_FACE)
        return part.drop_columns(["image"])

    def _row(self, row: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """A row of the flow -> a row of the part and its picture's file."""
        settings = Settings.model_validate_json(row["settings"]) if row["settings"] else None
        used = settings.model_dump(include=set(SETTING_TYPES)) if settings else {}
        if settings and settings.seed is not None:
            used["seed"] = settings.seed + row["index"]
        if settings and not isinstance(settings.controlnet_conditioning_scale, list):
            used["controlnet_conditioning_scale"] = [settings.controlnet_conditioning_scale]
        if settings and settings.context_guidance_scale is None:
            used["context_guidance_scale"] = settings.guidance_scale
        written: dict[str, Any] = {
            **{name: row.get(name) for name in OUTPUT.names if name in row},
            **used,
            "status": "failed" if row["error_code"] else "ok",
            QUERY: _label(row[QUERY]),
            **{n: None if row[n] is None else [_label(source) for source in row[n]] for n in (CONTEXT, CONTROL_IMAGE)},
            "control": "+".join(self.job.control_kinds) or "disabled",
            "fit": self.job.fit,
            "model": self.model,
            "created_at": datetime.now(UTC),
        }
        if (image := from_image(row["made_image"])) is None:
            return written, None
        written |= {"height": image.shape[0], "width": image.shape[1]} | self._scores(row, image)
        return written, encode_image(image, self.job.picture_format, metadata_of(written, row, self.job))

    def _scores(self, row: dict[str, Any], image: Pixels) -> dict[str, Any]:
        contexts = [required(context) for context in row["context_images"]]
        query, prompt = required(row["query_image"]), row[PROMPT]
        return {column: measure(column, image, query, contexts, prompt) for column in columns_of(self.job.score)}


def _over(old: pa.Table, new: pa.Table) -> pa.Table:
    """A part with some of its rows made anew, in the old order."""
    place = {row_id: number for number, row_id in enumerate(dict.fromkeys(old[ID].to_pylist()))}
    kept = old.filter(pc.invert(pc.is_in(old[ID], new[ID].combine_chunks())))
    both = pa.concat_tables([kept, new.cast(kept.schema)])
    order = sorted(range(len(both)), key=lambda row: (place[both[ID][row].as_py()], both["index"][row].as_py()))
    return both.take(pa.array(order, pa.int64()))


def _counts(shard: int, part: pa.Table, table: pa.Table) -> pa.Table:
    failed = part.filter(pc.equal(part["status"], "failed"))
    counts = {"shard": shard, "rows": len(part[ID].unique()), "failed": len(failed[ID].unique())}
    counts |= {"images": len(part) - len(failed)}
    counts |= {name: sum(filter(None, table[name].to_pylist())) for name in COUNTED}
    return pa.table({name: [value] for name, value in counts.items()})


def _label(source: dict[str, Any] | None) -> str | None:
    """How the output names a source: its URI; inline images have none."""
    return None if source is None else source["path"] or "inline"
