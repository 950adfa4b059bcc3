"""The native model's folder: one folder per component, as diffusers and transformers write them, and
model_index.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from context_diffusion.core.errors import ModelError
from context_diffusion.core.training_job import Normalization
from context_diffusion.models.context_encoders import load_vision_model
from context_diffusion.models.resolution.resolve import NATIVE

INDEX = "model_index.json"
# Fields of NativeModel that are stored in the index unchanged.
VALUES = (
    "scheduler_config",
    "image_size",
    "context_encoder",
    "context_size",
    "context_mean",
    "context_std",
    "context_slots",
    "noise_scale",
    "rest_scale",
    "detail_scale",
)


def save(model: Any, folder: Path, dtype: torch.dtype) -> None:
    for name, module in model.modules.items():
        # A copy, since converting in place and back would round this model's own weights.
        copy.deepcopy(module).to(dtype).save_pretrained(folder / name, safe_serialization=True)
        _forget_origin(folder / name / "config.json")
    model.tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": NATIVE} | {name: getattr(model, name) for name in VALUES}
    index["normalization"] = model.normalization.model_dump()
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _forget_origin(path: Path) -> None:
    """Remove the path that diffusers writes of where a component was loaded from: it is private to this
    machine."""
    config = json.loads(path.read_text())
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Load NativeModel's fields. kinds: the class of each component; None: its config names it."""
    index = _index(folder)
    parts = {name: _component(folder, name, kind) for name, kind in kinds.items()}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return {**parts, "tokenizer": tokenizer, **index}


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: {INDEX} cannot be read; expected a folder that `kind: train` writes"
        ) from error
    if index.pop("_class_name", None) != NATIVE:
        raise ModelError(f"{folder}: not a native Context Diffusion model (_class_name in {INDEX})")
    if "normalization" in index:
        try:
            index["normalization"] = Normalization.model_validate(index["normalization"])
        except ValidationError as error:
            raise ModelError(f"{folder}: normalization in {INDEX}: {error}") from error
    return dict(index)


def _component(folder: Path, name: str, kind: Any) -> torch.nn.Module:
    where = folder / name
    if not (where / "config.json").exists():
        raise ModelError(f"{folder}: the component {name}/ is missing; copy the whole model folder")
    try:
        module = (
            load_vision_model(where) if kind is None else kind.from_pretrained(where, use_safetensors=True)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{where}: cannot be loaded as {kind.__name__ if kind else 'a vision model'}: {error}"
        ) from error
    # A copy: float32 weights would stay in the mapped file, at unaligned addresses, which changes the last
    # bits of
    # results against the same weights in memory of their own.
    return copy.deepcopy(module.to(torch.float32))
