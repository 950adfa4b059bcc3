"""Small depth models of transformers with random weights, saved in the public format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    GLPNConfig,
    GLPNForDepthEstimation,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.glpn.image_processing_pil_glpn import GLPNImageProcessorPil


def make_dpt(folder: Path) -> str:
    """A DPT, which predicts inverse depth: near is large."""
    torch.manual_seed(5)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    processor = DPTImageProcessorPil(size={"height": 64, "width": 64})
    return _saved(folder / "dpt", DPTForDepthEstimation(config), processor)


def make_depth_anything(folder: Path, metric: bool = False) -> str:
    """metric: it predicts distances, so that far is large."""
    torch.manual_seed(6)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        patch_size=14,
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=16,
        depth_estimation_type="metric" if metric else "relative",
        max_depth=20 if metric else 1,
    )
    processor = DPTImageProcessorPil(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    name = "metric" if metric else "relative"
    return _saved(folder / name, DepthAnythingForDepthEstimation(config), processor)


def make_glpn(folder: Path) -> str:
    """A GLPN, which predicts distances; its input is as large as the image, in multiples of 32."""
    torch.manual_seed(7)
    config = GLPNConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    return _saved(folder / "glpn", GLPNForDepthEstimation(config), GLPNImageProcessorPil())


def _saved(folder: Path, model: Any, processor: Any) -> str:
    """Random weights hardly show the image: they are made louder."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.mul_(3.0)
    model.eval().save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    # As the published files name it, whichever class saved it.
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text())
    values["image_processor_type"] = values["image_processor_type"].removesuffix("Pil")
    file.write_text(json.dumps(values))
    return str(folder)
