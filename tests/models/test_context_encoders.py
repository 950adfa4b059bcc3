"""Other context encoders: tiny random ones in their public format, trained around, saved, loaded, run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from context_diffusion.core.errors import ModelError
from context_diffusion.core.training_job import Architecture
from context_diffusion.inputs.context_images import TEXTURE_PIXELS
from context_diffusion.models.context_encoders import load_encoder, patch_tokens
from context_diffusion.models.native.build import build
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.training.samples import make
from support.tiny import SIZES, make_tiny, picture, request
from support.training_steps import changed_by_a_step

LAYERS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    **LAYERS,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 16,
}  # 3 x 3 patches on a grid of 2 x 2
TEXT = {**LAYERS, "intermediate_size": 48, "vocab_size": 20, "max_position_embeddings": 8}
DINO = {
    **LAYERS,
    "mlp_ratio": 2,
    "image_size": 70,
    "patch_size": 14,
}  # trained at 70 pixels, cropped to 60: 4 x 4 patches


def encoder(kind: str) -> Any:
    torch.manual_seed(5)
    made = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "clip with text": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
        "siglip with text": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**DINO)),
        "dinov2 with registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
        ),
        "text": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
        "bert": lambda: BertModel(BertConfig(**LAYERS, intermediate_size=48, vocab_size=20)),
    }
    return made[kind]()


def saved(folder: Path, kind: str) -> Path:
    encoder(kind).save_pretrained(folder)
    if kind.startswith("dinov2"):
        crop = {
            "crop_size": {"height": 60, "width": 60},
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.25, 0.3],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(crop))
    return folder


def sizes(folder: Path) -> Architecture:
    return SIZES.model_copy(update={"context_encoder": str(folder)})


CLASSES = {
    "clip": (CLIPVisionModel, 48, 9, 0.4815),
    "clip with text": (CLIPVisionModel, 48, 9, 0.4815),
    "siglip": (SiglipVisionModel, 48, 9, 0.5),
    "siglip with text": (SiglipVisionModel, 48, 9, 0.5),
    "dinov2": (Dinov2Model, 60, 16, 0.4),
    "dinov2 with registers": (Dinov2WithRegistersModel, 60, 16, 0.4),
}


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_each_is_loaded_with_its_weights_size_constants_and_patches(kind: str, tmp_path: Path) -> None:
    component, size, patches, mean = CLASSES[kind]
    found = load_encoder(str(saved(tmp_path, kind)))
    assert type(found.model) is component
    assert (found.size, found.mean[0]) == (size, pytest.approx(mean, abs=1e-4))
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    pixels = torch.randn(2, 3, size, size)
    tokens = patch_tokens(found.model, pixels)
    assert tokens.shape == (2, patches, 24)
    whole = encoder(kind).eval()
    expected = getattr(whole, "vision_model", whole)(pixel_values=pixels).last_hidden_state
    assert torch.allclose(tokens, expected[:, expected.shape[1] - patches :], atol=1e-5)
    # The first patch is the upper left one: what changes there changes its token most, in random towers.
    pixels[:, :, :14, :14] += 3
    assert (patch_tokens(found.model, pixels) - tokens).abs().mean((0, 2)).argmax() == 0


@pytest.mark.parametrize("kind", ["clip with text", "siglip", "dinov2", "dinov2 with registers"])
def test_a_model_around_each_trains_saves_loads_and_makes_pictures(kind: str, tmp_path: Path) -> None:
    chosen = sizes(saved(tmp_path / "encoder", kind))
    model = make_tiny(chosen)
    changed = changed_by_a_step(model, chosen, tmp_path)
    assert changed == {"unet", "controlnet", "text_encoder", "fusion"}
    model.save_pretrained(tmp_path / "model", dtype=torch.float32)
    again = NativeModel.from_pretrained(tmp_path / "model")
    assert type(again.image_encoder) is CLASSES[kind][0]
    found = find_model(str(tmp_path / "model"))
    assert (found.image_size, found.contexts.size) == (64, max(CLASSES[kind][1], TEXTURE_PIXELS))
    row = request(4, contexts=2, prompt="ocean", guidance_scale=2.0, num_inference_steps=2)
    others = [
        dataclasses.replace(row, contexts=pair)
        for pair in ((picture(9), row.contexts[1]), (row.contexts[0], picture(9)))
    ]
    [image] = make(model, [row])
    assert np.array_equal(image, make(again, [row])[0])
    for other in others:
        assert not np.array_equal(image, make(model, [other])[0])


def test_pixels_are_normalised_as_the_encoder_was_trained_unless_asked_otherwise(tmp_path: Path) -> None:
    chosen = sizes(saved(tmp_path, "dinov2"))
    seen: list[torch.Tensor] = []
    images = torch.from_numpy(picture(1, 60 // 8 * 8 + 8, 64)[:60, :60].copy()).permute(2, 0, 1)[None]
    for kind in (None, "channel"):
        normalization = chosen.normalization.model_copy(update={"contexts": kind})
        model = build(chosen.model_copy(update={"normalization": normalization}), ["ocean"])
        model.image_encoder.register_forward_pre_hook(
            lambda _m, _a, given: seen.append(given["pixel_values"]), with_kwargs=True
        )
        model.encode_images(images)
    own = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]])[:, :, None, None]
    assert torch.allclose(seen[0][0], (images[0] / 255 - own[0]) / own[1], atol=1e-6)
    assert seen[1].mean((2, 3)).abs().max() < 1e-5


def test_what_is_no_encoder_is_told_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for kind in ("text", "bert"):
        with pytest.raises(
            ModelError,
            match=r"unknown model_type '(clip_text_model|bert)'; expected one of `small`, .*siglip",
        ):
            load_encoder(str(saved(tmp_path / kind, kind)))
    with pytest.raises(ModelError, match=r"'smal' has no readable config \(.+\); expected one of `small`"):
        build(SIZES.model_copy(update={"context_encoder": "smal"}), ["ocean"])
    folder = saved(tmp_path / "clip", "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("pre_layrnorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights of CLIPVisionModel are missing: \['pre_layrnorm.weight'\]"
    ):
        load_encoder(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded as CLIPVisionModel: .*safetensors"):
        load_encoder(str(folder))
