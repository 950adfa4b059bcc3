"""LoRAs of FLUX.2 [klein]: fused, they are what diffusers makes of them; one that changes nothing is
refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from context_diffusion.core.errors import ModelError
from context_diffusion.pipeline import ContextDiffusion
from support.klein_rows import (
    LEAST_LEVELS,
    assert_rows_equal_diffusers,
    klein_row,
    levels_apart,
    results_of,
)

ROW = klein_row(4, [(64, 64), (64, 64)], num_inference_steps=2)
# Of double and single blocks, and of what is around them.
LAYERS = [
    "to_q",
    "to_v",
    "add_k_proj",
    "to_out.0",
    "to_qkv_mlp_proj",
    "ff.linear_in",
    "x_embedder",
    "context_embedder",
    "proj_out",
]
QUERY = "transformer_blocks.0.attn.to_q"  # 32 x 32


@pytest.fixture(scope="module")
def lora(folders: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LoRA that diffusers saved for the tiny transformer."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = Flux2KleinPipeline.from_pretrained(folders[True])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="gaussian"))
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    weights = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(folder, transformer_lora_layers=weights, safe_serialization=True)
    return folder / "pytorch_lora_weights.safetensors"


def load(folders: dict[bool, Path], **parts: Any) -> ContextDiffusion:
    return ContextDiffusion.from_pretrained(
        {"base": str(folders[True]), **parts}, device="cpu", cpu_threads=1
    )


def fused(folders: dict[bool, Path], files: dict[Path, float]) -> Flux2KleinPipeline:
    """Return diffusers' pipeline with LoRAs fused at their scales."""
    pipe = Flux2KleinPipeline.from_pretrained(folders[True])
    for number, (file, scale) in enumerate(files.items()):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{number}")
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"a{number}"])
        pipe.unload_lora_weights()
    return pipe


def test_a_lora_is_what_diffusers_makes_of_it(
    folders: dict[bool, Path], models: Any, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(folders, lora=str(lora), lora_scale=0.7)
    assert "lora" not in capsys.readouterr().err
    [result] = assert_rows_equal_diffusers(model, fused(folders, {lora: 0.7}), [ROW])
    [without] = results_of(models(True), [ROW])
    [whole] = results_of(load(folders, lora=str(lora)), [ROW])
    assert levels_apart(result.image, without.image) > LEAST_LEVELS
    assert levels_apart(result.image, whole.image) > LEAST_LEVELS


def test_several_loras_are_fused_one_after_the_other(
    folders: dict[bool, Path], lora: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({name: weight.flip(0) for name, weight in load_file(lora).items()}, other)
    model = load(folders, lora=[str(lora), str(other)], lora_scale=[0.5, -0.3])
    assert_rows_equal_diffusers(model, fused(folders, {lora: 0.5, other: -0.3}), [ROW])


def weights_of(layer: str, seed: int, width: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
    return {f"{layer}.{part}.weight": torch.randn(s, generator=generator) for part, s in shapes.items()}


@pytest.mark.parametrize(
    "weights",
    [
        weights_of(f"unet.{QUERY}", 1),
        weights_of("transformer.blocks.0.attn1.to_q", 1),
        {name: torch.zeros_like(weight) for name, weight in weights_of(f"transformer.{QUERY}", 1).items()},
        weights_of(f"transformer.{QUERY}", 1, width=48),
    ],
    ids=["of a U-Net", "of another transformer", "of zeros", "of another width"],
)
def test_a_lora_that_changes_nothing_is_refused(
    folders: dict[bool, Path], tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(weights, file)
    with pytest.raises(ModelError, match=rf"lora {file} .*{folders[True]}"):
        load(folders, lora=str(file))


def test_the_keys_that_fit_no_layer_are_named(
    folders: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        weights_of(f"transformer.{QUERY}", 1) | weights_of("transformer.nowhere.to_q", 2),
        tmp_path / "partly.safetensors",
    )
    load(folders, lora=str(tmp_path / "partly.safetensors"))
    told = capsys.readouterr().err
    assert "only in part: 2 of its keys fit no layer: transformer.nowhere.to_q.lora_A.weight, " in told


def published(form: str) -> dict[str, torch.Tensor]:
    """Return a LoRA under the names of Black Forest Labs' own code, whose attention has one projection for
    queries, keys and values. form: a prefix; or kohya, whose files have alphas."""
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, torch.Tensor] = {}
    for layer, outputs in (("qkv", 96), ("proj", 32)):
        down, up = torch.randn(2, 32, generator=generator), torch.randn(outputs, 2, generator=generator)
        name = f"double_blocks.0.img_attn.{layer}"
        if form == "kohya":
            name = f"lora_unet_{name.replace('.', '_')}"
            weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            weights[f"{name}.alpha"] = torch.tensor(1.0)
        else:
            weights |= {f"{form}{name}.lora_A.weight": down, f"{form}{name}.lora_B.weight": up}
    return weights


@pytest.mark.parametrize("form", ["diffusion_model.", "base_model.model.", "kohya"])
def test_a_lora_in_the_published_names_fits_whole(
    folders: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    file = tmp_path / "published.safetensors"
    save_file(published(form), file)
    model = load(folders, lora=str(file), lora_scale=0.1)
    assert_rows_equal_diffusers(model, fused(folders, {file: 0.1}), [ROW])
    assert "only in part" not in capsys.readouterr().err
