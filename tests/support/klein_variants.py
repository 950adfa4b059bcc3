"""Other versions of a saved tiny FLUX.2 [klein]: copies of which one part is another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM


def with_text_layers(folder: Path, copy: Path, layers: int) -> Path:
    """Copy a model, with a text encoder of so many layers."""
    shutil.copytree(folder, copy)
    values = Qwen3Config.from_pretrained(folder / "text_encoder").to_dict()
    values = {name: value for name, value in values.items() if name != "layer_types"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = Qwen3ForCausalLM(Qwen3Config(**values | {"num_hidden_layers": layers}))
    shutil.rmtree(copy / "text_encoder")
    encoder.save_pretrained(copy / "text_encoder", safe_serialization=True)
    return copy


def with_transformer(folder: Path, copy: Path, **config: Any) -> Path:
    """Copy a model, with a transformer whose configuration differs."""
    shutil.copytree(folder, copy)
    values = dict(Flux2Transformer2DModel.load_config(folder / "transformer")) | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer = Flux2Transformer2DModel.from_config(values)
    shutil.rmtree(copy / "transformer")
    transformer.save_pretrained(copy / "transformer", safe_serialization=True)
    return copy


def without_chat_template(folder: Path, copy: Path) -> Path:
    """Copy a model, with a tokenizer that has no chat template."""
    shutil.copytree(folder, copy)
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    return copy


def with_index(folder: Path, copy: Path, **values: Any) -> Path:
    """Copy a model, with other values in its model_index.json."""
    shutil.copytree(folder, copy)
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))
    return copy
