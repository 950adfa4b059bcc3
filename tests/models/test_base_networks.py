"""Bases whose rows would all fail are refused before any engine starts, or when they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.resolution.base_networks import check_controlnet
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.pipeline import ContextDiffusion
from support.tiny import picture
from support.tiny_diffusers import SIDE, make_base, make_controlnet

BASE = "base"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """-> the folder of a base of Stable Diffusion, by whether it is an XL one."""
    return {xl: Path(make_base(tmp_path_factory.mktemp(BASE), xl)) for xl in (False, True)}


def changed(base: Path, folder: Path, file: str, **values: Any) -> str:
    """Copy a base, with other values in one of its configurations."""
    copy = folder / "changed"
    shutil.copytree(base, copy)
    config = copy / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return str(copy)


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels, the latents of its autoencoder have 4"),
        ("unet/config.json", {"in_channels": 8}, "reads 8 channels"),
        ("unet/config.json", {"out_channels": 8}, "predicts 8 channels"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "has class_embed_type"),
        ("unet/config.json", {"num_class_embeds": 1000}, "has num_class_embeds"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type image"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "has encoder_hid_dim_type"),
        ("unet/config.json", {"only_cross_attention": [True, False]}, "has only_cross_attention"),
        ("unet/config.json", {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2}, "has SimpleCrossAttn"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "its autoencoder is a AutoencoderTiny"),
        ("vae/config.json", {"out_channels": 6}, "decodes to 6 channels"),
        ("model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}, "no tokenizer"),
        ("model_index.json", {"vae": None}, "has no vae"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_generate_from_text_is_refused_before_it_is_loaded(
    bases: dict[bool, Path], tmp_path: Path, xl: bool, file: str, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        find_model(changed(bases[xl], tmp_path, file, **values))


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder_2"])
def test_a_base_of_xl_without_its_second_text_encoder_is_refused(
    bases: dict[bool, Path], tmp_path: Path, part: str
) -> None:
    with pytest.raises(ModelError, match=f"it has no {part}; expected a model that generates images"):
        find_model(changed(bases[True], tmp_path, "model_index.json", **{part: [None, None]}))


def test_an_autoencoder_of_another_kind_of_latents_is_refused(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    AutoencoderKL(latent_channels=16).save_config(tmp_path / "vae")
    with pytest.raises(ModelError, match=r"the latents of autoencoder .*vae have 16"):
        find_model(Parts(base=str(bases[False]), vae=str(tmp_path / "vae")))


@pytest.mark.parametrize(("xl", "part"), [(False, "tokenizer"), (True, "tokenizer"), (True, "tokenizer_2")])
def test_a_base_without_the_files_of_a_tokenizer_is_refused_when_it_is_loaded(
    bases: dict[bool, Path], tmp_path: Path, xl: bool, part: str
) -> None:
    """transformers makes an empty one."""
    copy = tmp_path / "copy"
    shutil.copytree(bases[xl], copy)
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"the {part} of .*copy gives more than the 77 tokens"):
        ContextDiffusion.from_pretrained(str(copy), device="cpu")


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_a_unet_of_another_text_is_refused_when_it_is_loaded(
    bases: dict[bool, Path], tmp_path: Path, xl: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bases[xl], copy)
    config = dict(UNet2DConditionModel.load_config(copy / "unet")) | {"cross_attention_dim": 48}
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    with pytest.raises(ModelError, match="reads text of width 48, its text encoders give"):
        ContextDiffusion.from_pretrained(str(copy), device="cpu")


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"in_channels": 9}, "fit the base: its in_channels is 9, that of the base 4"),
        (
            {"block_out_channels": [32, 32]},
            r"its block_out_channels is \[32, 32\], that of the base \[32, 64",
        ),
        ({"layers_per_block": 2}, r"its layers_per_block is \[2, 2\], that of the base \[1, 1"),
        ({"cross_attention_dim": 48}, "its cross_attention_dim is 48"),
        ({"class_embed_type": "timestep"}, "class_embed_type, which is not supported"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"conditioning_channels": 4}, "reads maps of 4 channels, control maps have 3"),
        ({"global_pool_conditions": True}, "global_pool_conditions: it reads no layout"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused_when_it_is_loaded(
    bases: dict[bool, Path], tmp_path: Path, xl: bool, values: dict[str, Any], told: str
) -> None:
    torch.manual_seed(0)
    config = dict(ControlNetModel.load_config(make_controlnet(tmp_path, xl))) | values
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "net")
    with pytest.raises(ModelError, match=f"controlnet .*net .*{told}"):
        ContextDiffusion.from_pretrained(
            {"base": str(bases[xl]), "controlnet": str(tmp_path / "net")}, device="cpu"
        )


def test_a_value_for_all_blocks_is_that_of_each() -> None:
    unet = {"block_out_channels": (32, 64), "layers_per_block": [2, 2], "in_channels": 4}
    check_controlnet("net", {"block_out_channels": [32, 64], "layers_per_block": 2, "in_channels": 4}, unet)


def test_a_small_controlnet_of_xl_attends_to_no_text_and_fits_any(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    config = dict(ControlNetModel.load_config(make_controlnet(tmp_path, xl=True)))
    count = len(config["down_block_types"])
    config |= {
        "down_block_types": ["DownBlock2D"] * count,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [0] * count,
        "cross_attention_dim": None,
    }
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "small")
    model = ContextDiffusion.from_pretrained(
        {"base": str(bases[True]), "controlnet": str(tmp_path / "small")}, device="cpu"
    )
    query = picture(0, SIDE, SIDE)
    settings = {"context_scale": 0.0, "num_inference_steps": 1}
    assert model(query, [query], "a boat", control="canny", **settings).size == (SIDE, SIDE)
