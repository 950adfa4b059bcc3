"""The last stage: a shard's images, then its part. Nothing here knows Ray."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from context_diffusion.config import GenerateJob, Settings
from context_diffusion.encoding import encode_image
from context_diffusion.evaluation.scores import columns_of, measure
from context_diffusion.output import Output, to_parquet
from context_diffusion.schema import (
    CONTEXT,
    CONTROL_IMAGE,
    COUNTED,
    ID,
    NEGATIVE_PROMPT,
    OUTPUT,
    PASSED,
    PROMPT,
    QUERY,
    SETTING_TYPES,
    Pixels,
    from_image,
    part_name,
    required,
)

HUGGING_FACE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


def safe_name(row_id: str) -> str:
    """A file name of an id: letters, digits and -_. stay; what is cut or replaced is told apart by a hash."""
    plain = unicodedata.normalize("NFC", row_id)
    kept = re.sub(r"[^A-Za-z0-9_.-]", "_", plain)[:80].lstrip(".") or "_"
    if kept == row_id and kept == kept.lower():
        return kept
    return f"{kept}-{hashlib.blake2b(row_id.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


@dataclass(frozen=True)
class WriteShard:
    """Encodes and creates a shard's images, then its part. What is there already stays: the first committer wins."""

    job: GenerateJob
    output: Output
    model: str
    replace: bool = False  # --retry-failed: the part is written anew

    def __call__(self, table: pa.Table) -> pa.Table:
        shard = table["shard"][0].as_py()
        rows = [self._write_image(row, shard) for row in table.to_pylist()]
        columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in OUTPUT}
        for name in table.column_names:
            if name.startswith(PASSED):
                columns[name.removeprefix(PASSED)] = table[name].combine_chunks()
        part = pa.table(columns).replace_schema_metadata(HUGGING_FACE)
        if self.job.image_format != "none":
            part = part.drop_columns(["image"]).replace_schema_metadata(None)
        put = self.output.storage.replace if self.replace else self.output.storage.create
        put(self.output.part(shard), to_parquet(part, ("image",)))
        failed = len({row[ID] for row in rows if row["status"] == "failed"})
        counts = {"shard": shard, "rows": len({row[ID] for row in rows}), "failed": failed, "images": 0}
        counts["images"] = sum(row["status"] == "ok" for row in rows)
        counts |= {name: sum(filter(None, table[name].to_pylist())) for name in COUNTED}
        return pa.table({name: [value] for name, value in counts.items()})

    def _write_image(self, row: dict[str, Any], shard: int) -> dict[str, Any]:
        """A row of the flow -> a row of the part; its picture is written on the way."""
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
        image = from_image(row["made_image"])
        if image is not None:
            written |= self._store(row, written, image, shard) | self._scores(row, image)
        return written

    def _store(self, row: dict[str, Any], written: dict[str, Any], image: Pixels, shard: int) -> dict[str, Any]:
        form = self.job.image_format
        data = encode_image(image, "png" if form == "none" else form, self._metadata(written))
        stored = {"height": image.shape[0], "width": image.shape[1], "sha256": hashlib.sha256(data).hexdigest()}
        if form == "none":
            return {**stored, "image": {"bytes": data, "path": None}}
        name = f"images/{part_name(shard)}/{safe_name(row[ID])}-{row['index']}.{form}"
        if not self.output.storage.create(f"{self.output.root}/{name}", data):
            # An earlier attempt's picture stands there (made on another kind of device, perhaps): the row is its.
            earlier = self.output.storage.read(f"{self.output.root}/{name}")
            stored["sha256"] = hashlib.sha256(earlier).hexdigest()
        return {**stored, "file_name": name}

    def _metadata(self, written: dict[str, Any]) -> dict[str, str]:
        """What is needed to make the picture again; no time stands in it, so equal rows have equal bytes."""
        keys = (ID, "index", *SETTING_TYPES, QUERY, CONTEXT, CONTROL_IMAGE, PROMPT, NEGATIVE_PROMPT, "control", "fit", "model")
        told = {key: written.get(key) for key in keys if written.get(key) is not None}
        return {"context_diffusion": json.dumps(told, sort_keys=True), "Software": "context-diffusion"}

    def _scores(self, row: dict[str, Any], image: Pixels) -> dict[str, Any]:
        contexts = [required(context) for context in row["context_images"]]
        query, prompt = required(row["query_image"]), row[PROMPT]
        return {column: measure(column, image, query, contexts, prompt) for column in columns_of(self.job.score)}


def _label(source: dict[str, Any] | None) -> str | None:
    """How the output names a source: its URI; inline images have none."""
    return None if source is None else source["path"] or "inline"
