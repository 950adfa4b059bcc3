"""All column names and Arrow schemas. A column is named here and nowhere else.

A shard passes through the stages as one Arrow table with the READ columns of the read task, the LOADED
columns of the loading and the MADE columns of the engine; the part that is written has the OUTPUT columns.
Unknown manifest columns are copied to the output, with the prefix PASSED in between."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from context_diffusion.core.records import Pixels
from context_diffusion.core.settings import Settings

ScoreName = Literal["layout", "style", "similarity", "prompt", "leakage"]
COLUMNS_BY_SCORE: dict[ScoreName, tuple[str, ...]] = {
    "layout": ("layout_score",),
    "style": ("style_score",),
    "similarity": ("style_similarity",),
    "prompt": ("prompt_score",),
    "leakage": ("layout_leakage", "colour_leakage"),
}


def columns_of(scores: Sequence[ScoreName]) -> list[str]:
    """Return the columns of scores."""
    return [column for name in COLUMNS_BY_SCORE if name in scores for column in COLUMNS_BY_SCORE[name]]


ID, QUERY, CONTEXT, PROMPT, NEGATIVE_PROMPT = "id", "query", "context", "prompt", "negative_prompt"
CONTROL_IMAGE = "control_image"  # control maps of a row, in place of those computed from its query
CONTEXT_MASKS = "context_masks"  # an image for each context: where in the output it acts
SOURCES = (QUERY, CONTEXT, CONTROL_IMAGE, CONTEXT_MASKS)  # columns of images
SOURCE_LISTS = (CONTEXT, CONTROL_IMAGE, CONTEXT_MASKS)
TARGET = "target"  # of a finetune job's manifest: the image that query and contexts should become
SETTINGS = tuple(Settings.model_fields)
MANIFEST_COLUMNS = (ID, *SOURCES, PROMPT, NEGATIVE_PROMPT, *SETTINGS)
PASSED = "passed:"  # prefix of unknown manifest columns between the stages
FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the Hugging Face Image storage type
# Schema metadata by which `datasets` decodes the column `image`.
HUGGING_FACE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
IMAGE = pa.struct([("data", pa.binary()), ("height", pa.int32()), ("width", pa.int32())])  # raw uint8 RGB
READ = pa.schema(
    [
        ("shard", pa.int64()),
        (ID, pa.string()),
        (QUERY, FILE),
        (CONTEXT, pa.list_(FILE)),
        (CONTROL_IMAGE, pa.list_(FILE)),
        (CONTEXT_MASKS, pa.list_(FILE)),
        (PROMPT, pa.string()),
        (NEGATIVE_PROMPT, pa.string()),
        # JSON: the row's over the job's, with a seed; after `generate` the image's
        ("settings", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)

LOADED = pa.schema(
    [
        ("query_image", IMAGE),
        ("output_width", pa.int32()),
        ("output_height", pa.int32()),
        ("control_images", pa.list_(IMAGE)),  # null: the engine computes it
        ("context_images", pa.list_(IMAGE)),
        ("mask_images", pa.list_(IMAGE)),
        ("query_mean", pa.list_(pa.float32())),
        ("query_std", pa.list_(pa.float32())),
    ]
)

MADE = pa.schema(
    [
        ("index", pa.int32()),
        ("made_image", IMAGE),
        ("seconds", pa.float32()),
        ("lanes", pa.int32()),
        ("chunk", pa.int32()),
        ("device", pa.string()),
        ("compiled", pa.bool_()),
        ("prompt_truncated", pa.bool_()),
        ("unknown_words", pa.list_(pa.string())),
        ("full_prompt", pa.string()),
        ("vae_tiled", pa.bool_()),
        ("unsafe", pa.bool_()),
        ("used_lane_steps", pa.int64()),
        ("paid_lane_steps", pa.float64()),
    ]
)

COUNTED = ("used_lane_steps", "paid_lane_steps")  # summed over a run
STAGES = ("load", "generate", "write")  # each leaves a column STAGE_span, the same in all rows of a shard
SPAN = pa.struct([("began", pa.float64()), ("seconds", pa.float64())])  # began: seconds since the epoch
FAILURES_TOLD = 20  # of one shard, in WRITTEN
WRITTEN = pa.schema(  # one row per shard, for the driver
    [
        ("shard", pa.int64()),
        *((name, pa.int64()) for name in ("rows", "failed", "images")),  # of its part
        ("rows_made", pa.int64()),  # by this attempt, including failed ones; a retried part has more rows
        ("images_made", pa.int64()),
        ("bytes", pa.int64()),  # of the part and its image files
        ("codes", pa.map_(pa.string(), pa.int64())),  # failed rows by code
        ("failures", pa.list_(pa.struct([(name, pa.string()) for name in (ID, "code", "message")]))),
        *((f"{stage}_span", SPAN) for stage in STAGES),
        *((name, pa.float64()) for name in COUNTED),
    ]
)

# Settings with a value for each ControlNet.
CONTROL_SETTINGS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
SETTING_TYPES: dict[str, pa.DataType] = {
    "seed": pa.int64(),
    "num_inference_steps": pa.int32(),
    "scheduler": pa.string(),
    "guidance_scale": pa.float64(),
    "context_guidance_scale": pa.float64(),
    "guidance_rescale": pa.float64(),
    **dict.fromkeys(CONTROL_SETTINGS, pa.list_(pa.float64())),
    "context_scale": pa.float64(),
    "context_blocks": pa.string(),  # a name, or JSON
    "context_weights": pa.list_(pa.float64()),
    "lora": pa.string(),
    "lora_scale": pa.float64(),
    "strength": pa.float64(),
    "num_images": pa.int32(),
}

SCORE_COLUMNS = tuple(column for columns in COLUMNS_BY_SCORE.values() for column in columns)
OUTPUT = pa.schema(
    [
        (ID, pa.string()),
        ("index", pa.int32()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("file_name", pa.string()),
        ("image", FILE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        *SETTING_TYPES.items(),
        (QUERY, pa.string()),
        (CONTEXT, pa.list_(pa.string())),
        (CONTROL_IMAGE, pa.list_(pa.string())),
        (CONTEXT_MASKS, pa.list_(pa.string())),
        (PROMPT, pa.string()),
        (NEGATIVE_PROMPT, pa.string()),
        ("full_prompt", pa.string()),  # what a model with a prompt_template read in place of the prompt
        ("control", pa.string()),
        ("fit", pa.string()),
        ("model", pa.string()),
        ("query_mean", pa.list_(pa.float32())),
        ("query_std", pa.list_(pa.float32())),
        *((name, pa.float32()) for name in SCORE_COLUMNS),
        ("flagged", pa.bool_()),  # a score is beyond its threshold; null: no score was computed
        ("unsafe", pa.bool_()),  # according to the model's safety checker; null without one
        ("seconds", pa.float32()),
        ("device", pa.string()),
        ("compiled", pa.bool_()),  # by torch.compile, which changes the last bits of pixels, as does
        ("chunk", pa.int32()),  # the number of lanes in one call of the model
        ("lanes", pa.int32()),  # of this image
        ("prompt_truncated", pa.bool_()),
        ("unknown_words", pa.list_(pa.string())),  # of the prompt, without an effect; null: any word has one
        ("vae_tiled", pa.bool_()),  # decoded in tiles after running out of memory, which changes pixels
        ("created_at", pa.timestamp("ms", tz="UTC")),
    ]
)


def output_digest() -> str:
    """Return a digest of the OUTPUT columns and their types."""
    return hashlib.sha256(OUTPUT.to_string().encode()).hexdigest()[:16]


SCORES = pa.schema(
    [OUTPUT.field(name) for name in (ID, "index", *SCORE_COLUMNS, "error_code", "error_message")]
)


def to_image(pixels: Pixels | None) -> dict[str, Any] | None:
    """Convert uint8 (H, W, 3) to a value of the Arrow type IMAGE."""
    if pixels is None:
        return None
    return {"data": pixels.tobytes(), "height": pixels.shape[0], "width": pixels.shape[1]}


def from_image(value: dict[str, Any] | None) -> Pixels | None:
    """Convert a value of the Arrow type IMAGE to uint8 (H, W, 3), read-only."""
    if value is None:
        return None
    return np.frombuffer(value["data"], np.uint8).reshape(value["height"], value["width"], 3)


def span(began: float) -> dict[str, float]:
    """Return the SPAN value from `began`, by time.time(), to now."""
    return {"began": began, "seconds": max(time.time() - began, 0.0)}  # a clock may be set back


def with_span(table: pa.Table, stage: str, began: float) -> pa.Table:
    """Add the column of a shard's time in a stage that ends now."""
    return table.append_column(f"{stage}_span", pa.array([span(began)] * len(table), SPAN))


def known_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return a table's rows without the unknown manifest columns, which stay in Arrow."""
    return table.select([name for name in table.column_names if not name.startswith(PASSED)]).to_pylist()


def required(value: dict[str, Any] | None) -> Pixels:
    """Convert a value of the Arrow type IMAGE that must not be null."""
    pixels = from_image(value)
    assert pixels is not None
    return pixels
