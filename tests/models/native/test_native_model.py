"""The native model: masked fusion, normalisation, a folder that others can load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel

from context_diffusion.core.errors import ModelError
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.normalization import normalise
from context_diffusion.models.resolution.resolve import BUNDLED
from support.tiny import picture, tiny_model


def tensor(seed: int) -> torch.Tensor:
    return torch.from_numpy(picture(seed)).permute(2, 0, 1)[None]


@torch.inference_mode()
def test_an_empty_slot_changes_no_bit_whatever_lies_in_it() -> None:
    model = tiny_model()
    text, mask = model.encode_text(["ocean"])
    contexts = torch.zeros(1, 8, 4, 32)
    contexts[0, 0] = model.encode_images(tensor(1))[0]
    weights = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    noise, time = torch.randn(1, *model.latent_shape), torch.tensor([500.0])
    clean = model.predict(noise, time, *model.fuse(text, mask, contexts, weights), None, None)
    contexts[0, 1:] = 50.0
    assert torch.equal(
        clean, model.predict(noise, time, *model.fuse(text, mask, contexts, weights), None, None)
    )
    heavier = model.predict(noise, time, *model.fuse(text, mask, contexts, weights + 1), None, None)
    assert not torch.equal(clean, heavier)


@torch.inference_mode()
def test_without_contexts_the_null_context_speaks() -> None:
    model = tiny_model()
    text, mask = model.encode_text([None])
    contexts, none = torch.randn(1, 8, 4, 32), torch.zeros(1, 8)
    _, bias = model.fuse(text, mask, contexts, none)
    assert (bias[0, 0, -4:] == 0).all()
    assert (bias[0, 0, text.shape[1] : -4] < -1000).all()
    given = torch.tensor([[0.5, 0, 0, 0, 0, 0, 0, 0]])
    _, bias = model.fuse(text, mask, contexts, given)
    assert (bias[0, 0, -4:] < -1000).all()
    assert bias[0, 0, text.shape[1]].item() == pytest.approx(-0.6931, abs=1e-3)


def test_normalisation_is_each_pictures_own_and_a_constant_one_becomes_zero() -> None:
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    values, mean, std = normalise(
        torch.cat([tensor(3)[..., :8, :8], tensor(3)[..., 8:16, 8:16], flat]), "channel"
    )
    assert values[2].abs().max() == 0
    assert mean[2].tolist() == pytest.approx([200 / 255] * 3)
    assert std[2].tolist() == [0, 0, 0]
    alone, _, _ = normalise(tensor(3), "channel")
    assert alone.mean((2, 3)).abs().max() < 1e-5
    assert alone.flatten(2).std(2, correction=0).sub(1).abs().max() < 1e-4


@torch.inference_mode()
def test_a_brighter_query_is_the_same_control_input() -> None:
    model = tiny_model()
    image = tensor(4) // 2
    plain = model.encode_control(image, ["gray"])
    assert (plain - model.encode_control(image + 60, ["gray"])).abs().max() < 1e-3
    edges = model.encode_control(image, ["canny"])
    assert (edges - model.encode_pixels(image)).abs().max() < 1e-5, "an edge map is taken as it is"
    assert (edges - plain).abs().max() > 1e-2


def test_a_folder_loads_again_and_its_parts_load_with_the_public_classes(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, dtype=torch.float32)
    again = NativeModel.from_pretrained(tmp_path)
    for name, module in model.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, again.modules[name].state_dict()[key])
    assert again.encode_text(["dots forest"])[0].equal(model.encode_text(["dots forest"])[0])
    assert again.latent_shape == model.latent_shape
    for name, public in (
        ("vae", AutoencoderTiny),
        ("unet", UNet2DConditionModel),
        ("controlnet", ControlNetModel),
    ):
        public.from_pretrained(tmp_path / name, use_safetensors=True)
    again.save_pretrained(tmp_path / "twice")
    for config in (*(tmp_path / "twice").rglob("*.json"), *BUNDLED.rglob("*.json")):
        assert str(tmp_path) not in (text := config.read_text()), "where a part was loaded from"
        assert "_name_or_path" not in text


def test_a_folder_that_is_no_model_is_told_by_its_missing_part(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        NativeModel.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(ModelError, match="unet/ is missing"):
        NativeModel.from_pretrained(tmp_path)
