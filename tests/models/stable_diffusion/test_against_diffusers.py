"""A row of any mixed batch is the picture that diffusers' own pipeline makes of that row alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.models.stable_diffusion.backbone import StableBackbone
from support.diffusers_reference import Model, compare, reference, row
from support.local_job import run_job
from support.tiny import picture
from support.tiny_diffusers import SIDE, make_base, make_controlnet, make_image_encoder, make_ip_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """-> the `model:` mapping of a kind: (xl, plus)."""

    @cache
    def make(xl: bool, plus: bool) -> Model:
        folder = tmp_path_factory.mktemp("sd")
        base = make_base(folder, xl)
        encoder = make_image_encoder(folder)
        nets = [make_controlnet(folder, xl, seed) for seed in (1, 2)]
        return {
            "base": base,
            "controlnet": nets,
            "image_encoder": encoder,
            **make_ip_adapter(folder, base, plus, xl),
        }

    return make


MIXED: list[dict[str, Any]] = [
    {"contexts": 1, "num_inference_steps": 4, "scheduler": "euler"},
    {"contexts": 3, "prompt": "a red house by the sea", "guidance_scale": 1.0, "scheduler": "dpmpp_2m"},
    {
        "contexts": 2,
        "prompt": None,
        "context_scale": 0.4,
        "num_inference_steps": 5,
        "controlnet_conditioning_scale": [0.3, 0.9],
    },
    {
        "contexts": 4,
        "negative_prompt": "blurry",
        "control_guidance_end": 0.6,
        "num_inference_steps": 6,
        "scheduler": "euler_a",
    },
    {
        "contexts": 1,
        "control_guidance_start": 0.4,
        "num_inference_steps": 5,
        "scheduler": "ddpm",
        "context_scale": 0.0,
    },
    {
        "contexts": 2,
        "strength": 0.6,
        "num_inference_steps": 6,
        "scheduler": "dpmpp_2m_karras",
        "size": (64, 96),
    },
    {"contexts": 1, "scheduler": "lcm", "guidance_scale": 0.0, "negative_prompt": "ugly"},
    {
        "contexts": 2,
        "scheduler": "dpmpp_sde",
        "num_inference_steps": 5,
        "guidance_scale": 9.0,
        "size": (96, 64),
    },
    {"contexts": 1, "scheduler": "ddim", "strength": 0.5, "num_inference_steps": 4, "prompt": "words " * 20},
]

SLOW = pytest.mark.slow  # `make test` has one kind of each, `make test-full` the others

KINDS = [
    (False, False),
    pytest.param(False, True, marks=SLOW),
    pytest.param(True, False, marks=SLOW),
    (True, True),
]


@pytest.mark.parametrize(("xl", "plus"), KINDS)
def test_each_row_of_a_mixed_batch_is_what_diffusers_makes_of_it_alone(
    models: Any, xl: bool, plus: bool
) -> None:
    compare(models(xl, plus), [row(number, **own) for number, own in enumerate(MIXED)], xl)


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=SLOW)])
def test_without_controlnet_and_without_ip_adapter_too(models: Any, xl: bool) -> None:
    model = models(xl, False)
    rows = [row(n, control=[], scheduler=name) for n, name in enumerate(("ddim", "euler", "dpmpp_2m"))]
    rows.append(row(9, control=[], strength=0.7, num_inference_steps=4))
    compare(model, rows, xl)
    plain = {
        name: part for name, part in model.items() if "ip_adapter" not in name and name != "image_encoder"
    }
    compare(plain, [row(5), row(6, control=[], guidance_scale=1.0)], xl)


CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "0"},
    "negative prompt": {"negative_prompt": "~ dull, grey and blurred ~ ~ ~"},
    "contexts": {"contexts": 3},
    "steps": {"num_inference_steps": 2},
    "scheduler": {"scheduler": "euler_a"},
    "guidance": {"guidance_scale": 12.0},
    "control map": {"control": ["none", "soft_edges"]},
    "control scale": {"controlnet_conditioning_scale": [0.0, 1.0]},
    "control window": {"control_guidance_end": 0.4},
    "context scale": {"context_scale": 0.1},
    "seed": {"seed": 77},
    "strength": {"strength": 0.6},
}


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=SLOW)])
def test_each_input_moves_the_reference_itself(models: Any, xl: bool) -> None:
    """Else a model that ignores an input could pass."""
    model = models(xl, True)
    base = reference(model, row(1), xl)[1].astype(int)
    still = [
        what
        for what, change in CHANGES.items()
        if np.abs(reference(model, row(1, **change), xl)[1] - base).max() < 20
    ]
    assert not still


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_the_mean_and_std_of_latents_are_read_where_diffusers_reads_them(tmp_path: Path, xl: bool) -> None:
    """By its XL pipelines alone, where an autoencoder's configuration has both."""
    base = make_base(tmp_path, xl)
    rows = [
        row(1, control=[]),
        row(2, control=[], strength=0.6),
        row(3, control=["canny"]),
        row(4, control=["canny"], strength=0.7),
    ]
    model = {"base": base, "controlnet": [make_controlnet(tmp_path, xl)]}
    config = Path(base) / "vae" / "config.json"
    mean = {"latents_mean": [0.1, -0.3, 0.2, 0.4]}
    own = json.loads(config.read_text()) | mean | {"latents_std": [1.3, 0.8, 2.0, 0.7]}
    config.write_text(json.dumps(own))
    compare(model, rows, xl)


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_a_controlnet_of_maps_in_bgr_reads_them_so(tmp_path: Path, xl: bool) -> None:
    net = make_controlnet(tmp_path, xl)
    config = Path(net) / "config.json"
    order = {"controlnet_conditioning_channel_order": "bgr"}
    config.write_text(json.dumps(json.loads(config.read_text()) | order))
    model = {"base": make_base(tmp_path, xl), "controlnet": [net, make_controlnet(tmp_path, xl, 2)]}
    rows = [row(1, control=["none", "canny"]), row(2, control=["tile", "none"], guidance_scale=1.0)]
    compare(model, rows, xl)


def test_an_image_that_was_decoded_in_tiles_is_recorded_so_in_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After memory did not suffice for the whole image."""
    decode = StableBackbone.decode
    whole: list[bool] = []

    def short(backbone: StableBackbone, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        whole.append(not tiled)
        if not tiled and latents.shape[3] > SIDE // 2:
            raise torch.OutOfMemoryError("too large")
        return decode(backbone, latents, tiled)

    monkeypatch.setattr(StableBackbone, "decode", short)
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    rows = [
        {"id": str(width), "query": "a.png", "context": ["a.png"], "width": width}
        for width in (SIDE, 2 * SIDE)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"kind": "generate", "manifest": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out")}
    settings = {"num_inference_steps": 1}
    model = {"base": make_base(tmp_path)}
    written = run_job(GenerateJob.model_validate(values | {"model": model, "settings": settings}))
    assert {row["id"]: row["vae_tiled"] for row in written} == {str(SIDE): False, str(2 * SIDE): True}
    assert sorted(whole) == [False, True, True]
