"""Where training computes. Without a GPU the meta device stands in for one: what is left on the CPU doesn't
mix with it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.fx.experimental._config as fx

from context_diffusion.cluster.train_workers import _device
from context_diffusion.core.errors import ConfigError
from context_diffusion.core.training_job import TrainJob
from context_diffusion.models.native.build import build
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.training import autoencoder
from context_diffusion.training.data.encoded_pools import encode_pool
from context_diffusion.training.data.pools import make_pool
from context_diffusion.training.diffusion import Run
from context_diffusion.training.run import find_device, run_training
from support.tiny import GPU, SIZES
from support.training_steps import pool


def job(folder: Path, **more: object) -> TrainJob:
    values = {
        "styles": 4,
        "pictures": 4,
        "max_steps": 2,
        "architecture": SIZES.model_dump(),
        "diffusion": {"batch_size": 4},
    }
    return TrainJob.model_validate({"kind": "train", "output": str(folder)} | values | more)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, found in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert (find_device("auto").type, find_device("cpu").type) == (found, "cpu")
    assert find_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda, but torch finds no GPU"):
        find_device("cuda")


def test_workers_are_on_gpus_where_each_has_one(tmp_path: Path) -> None:
    for wanted, gpus, found in (
        ("auto", 0, "cpu"),
        ("auto", 1, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 2, "cuda"),
    ):
        assert _device(job(tmp_path, workers=2, device=wanted), gpus) == found
    with pytest.raises(ConfigError, match=r"each of 2 worker\(s\) needs a GPU, the cluster has 1"):
        _device(job(tmp_path, workers=2, device="cuda"), 1)


def test_all_that_a_step_computes_with_is_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:  # its encoder asks for values
        return torch.zeros(len(prompts), 8, 32, device="meta"), torch.ones(
            len(prompts), 8, dtype=torch.bool, device="meta"
        )

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(fx, "meta_nonzero_assume_all_nonzero", True)
    model = build(SIZES, ["ocean"]).to("meta")
    monkeypatch.setattr(model, "encode_text", text)
    first = autoencoder._Stage(job(tmp_path), model, tmp_path / "autoencoder.pt", 1, model.vae)
    first._loss(pool(64), crop=True).backward()
    model.vae.requires_grad_(False)
    run, encoded = Run(job(tmp_path), model, tmp_path, {}), encode_pool(model, pool(64))
    samples = encoded.samples(np.random.default_rng(1), 4, 0.0, 0.5, np.arange(4))
    hints = replace(
        samples.hints, palettes=encoded.palettes.repeat(3, 1), textures=encoded.textures.repeat(3)
    )  # type: ignore[type-var]
    samples = replace(samples, counts=np.full(4, 3), contexts=encoded.as_contexts[:12], hints=hints)
    run.loss(samples, np.arange(4), 4, torch.Generator().manual_seed(1)).backward()
    grads = [parameter.grad for parameter in run.modules.parameters() if parameter.grad is not None]
    assert {value.device.type for value in (*grads, *run.average.values())} == {"meta"}
    assert len(grads) > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_resumes_and_leaves_a_model_that_loads_anywhere(tmp_path: Path) -> None:
    run_training(job(tmp_path, device="cuda"))
    summary = run_training(job(tmp_path, device="cuda", max_steps=4))
    assert summary["steps"] == 4
    assert np.isfinite(summary["validation_loss"])
    assert NativeModel.from_pretrained(summary["model"]).device.type == "cpu"


@pytest.mark.parametrize(("kind", "size"), [("cpu", 4), pytest.param("cuda", 64, marks=GPU)])
def test_the_bundled_models_gradients_are_numbers(tmp_path: Path, kind: str, size: int) -> None:
    """cuDNN's attention gave NaN at the second step on an H200, whatever the batch."""
    model = NativeModel.from_pretrained(model_folder("bundled")).to(kind)
    run = Run(job(tmp_path, max_steps=100, diffusion={"batch_size": size}), model, tmp_path, {})
    source = encode_pool(model, make_pool(5, size, 5))
    losses = [run.train_step(source) for _ in range(size // 2)]
    assert run.clipping.left_out() == 0
    assert torch.stack(losses).isfinite().all()
