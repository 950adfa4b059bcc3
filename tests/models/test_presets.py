"""The larger presets: their shapes and costs without their weights, and a step of the one for 256 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from context_diffusion.core.errors import ConfigError
from context_diffusion.core.job_file import check_job
from context_diffusion.core.training_job import Architecture, TrainJob
from context_diffusion.models.native.build import build
from context_diffusion.training.samples import make
from support.job_files import load_job
from support.tiny import SIZES, make_tiny, request
from support.training_steps import changed_by_a_step

JOBS = Path(__file__).parents[2] / "jobs"


def preset(name: str) -> Architecture:
    """With the small context encoder: another one would have to be fetched."""
    job = load_job(str(JOBS / f"{name}.yaml"))
    assert isinstance(job, TrainJob)
    return job.architecture.model_copy(update={"context_encoder": "small"})


# Millions of weights; billions of operations of one call of ControlNet and U-Net.
@pytest.mark.parametrize(
    ("name", "levels", "weights", "operations"),
    [("train", 3, 16.8, 4.34), ("train_256", 3, 96.4, 26), ("train_512", 4, 277, 145)],
)
def test_a_presets_shapes_weights_and_operations(
    name: str, levels: int, weights: float, operations: float
) -> None:
    sizes = preset(name)
    side, tokens = sizes.image_size, sizes.context_grid**2
    with torch.device("meta"):
        model = build(sizes, ["ocean"])
        text, mask = (
            torch.zeros(2, sizes.text_length, sizes.width),
            torch.ones(2, sizes.text_length, dtype=torch.bool),
        )
        assert model.encode_images(torch.zeros(3, 3, side, side, dtype=torch.uint8)).shape == (
            3,
            tokens,
            sizes.width,
        )
        hidden, bias = model.fuse(text, mask, torch.zeros(2, 8, tokens, sizes.width), torch.ones(2, 8))
        assert hidden.shape == (2, sizes.text_length + 9 * tokens, sizes.width)
        latents, times = torch.zeros(2, *model.latent_shape), torch.zeros(2)
        with FlopCounterMode(display=False) as counter:
            down, mid = model.control(latents, times, torch.zeros_like(latents))
            output = model.predict(latents, times, hidden, bias, down, mid)
        grid = side // sizes.place
        assert output.shape == (2, sizes.folded_channels, grid, grid)
        assert mid.shape[2] == grid // 2 ** (levels - 1)
        assert model.decode(latents).shape == (2, 3, side, side)
    assert sum(p.numel() for m in model.modules.values() for p in m.parameters()) / 1e6 == pytest.approx(
        weights, rel=0.02
    )
    assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.05)


@pytest.mark.slow  # memory rather than time: 3 GB for the weights, their gradients, averages and momenta
def test_the_preset_for_256_pixels_takes_a_step(tmp_path: Path) -> None:
    sizes = preset("train_256")
    torch.manual_seed(1)
    changed = changed_by_a_step(build(sizes, ["ocean"]), sizes, tmp_path, batch_size=1)
    assert changed == {"unet", "controlnet", "image_encoder", "text_encoder", "fusion"}


@pytest.mark.parametrize("attention", [[False, False, True], [True, False, False], [True, True, True]])
def test_attention_stands_at_the_levels_that_are_named_and_odd_sizes_fit(attention: list[bool]) -> None:
    sizes = SIZES.model_copy(update={"channels": [16, 16, 32], "attention": attention, "layers_per_block": 2})
    model = make_tiny(sizes)
    assert [hasattr(block, "attentions") for block in model.unet.down_blocks] == attention
    assert [hasattr(block, "attentions") for block in model.unet.up_blocks] == attention[::-1]
    # 80 pixels are 10 latents, 5 a level below, 3 at the lowest.
    [image] = make(model, [request(2, size=(80, 112), num_inference_steps=1)])
    assert image.shape == (80, 112, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"channels": [64, 128, 256]}, r"attention has 2 levels, channels has 3"),
        (
            {"channels": [64, 64, 64], "attention": [True] * 3, "image_size": 144},
            r"image_size \(144\) must be a multiple of 32",
        ),
        ({"channels": [64, 100]}, r"multiple of 16"),
        ({"normalization": {"contexts": "batch"}}, r"normalization.contexts: .*'none', 'image' or 'channel'"),
    ],
)
def test_levels_that_do_not_fit_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_job({"kind": "train", "output": "x", "architecture": values})
