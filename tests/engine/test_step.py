"""A step is one graph that launches no more than diffusers' own step, copies nothing and never waits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from context_diffusion.core.records import Request
from context_diffusion.engine.lane_buffers import LaneBuffers
from context_diffusion.engine.step import Variant, denoise
from context_diffusion.pipeline import ContextDiffusion
from support.diffusers_reference import Model, row
from support.klein_rows import Size
from support.launches import (
    buffers_of,
    calls_of_a_step,
    chunk_of,
    klein_rows,
    launches_of_diffusers,
    launches_of_diffusers_klein,
    make_whole_klein,
    make_whole_model,
    rows_of,
)
from support.tiny import GPU, request, tiny_model
from support.tiny_diffusers import make_base, make_controlnet, make_image_encoder, make_ip_adapter
from support.tiny_flux2 import save_tiny_klein


@pytest.mark.parametrize("xl", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sd15", "sdxl"])
def test_a_step_launches_no_more_than_diffusers_and_copies_and_reads_nothing(
    tmp_path: Path, xl: bool
) -> None:
    """On all layers of the published U-Nets and ControlNets, made narrow."""
    model = make_whole_model(tmp_path, xl)
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)
    rows = rows_of(4)
    ours = calls_of_a_step(pipeline, rows)
    assert (ours.copies, ours.reads) == (0, 0)
    assert ours.launches <= launches_of_diffusers(model, rows, xl)


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "guided"])
def test_a_step_of_klein_launches_no_more_than_diffusers_and_copies_and_reads_nothing(
    tmp_path: Path, distilled: bool
) -> None:
    """On all layers of FLUX.2 [klein] 4B, made narrow; the rows have references of their own, padded."""
    model = make_whole_klein(tmp_path, distilled)
    pipeline = ContextDiffusion.from_pretrained(str(model), device="cpu", cpu_threads=1)
    rows = klein_rows(pipeline, 4, [(64, 64), (64, 64), (80, 64)])
    ours = calls_of_a_step(pipeline, rows)
    assert (ours.copies, ours.reads) == (0, 0)
    assert ours.launches <= launches_of_diffusers_klein(model, rows)


def test_the_native_models_step_copies_and_reads_nothing(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    pipeline = ContextDiffusion.from_pretrained(str(tmp_path), device="cpu", cpu_threads=1)
    calls = calls_of_a_step(pipeline, [request(1, contexts=2, prompt="ocean", guidance_scale=3.0)])
    assert (calls.copies, calls.reads) == (0, 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ContextDiffusion:
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder)
    model: Model = {
        "base": base,
        "controlnet": make_controlnet(folder),
        "image_encoder": make_image_encoder(folder),
        **make_ip_adapter(folder, base),
    }
    return ContextDiffusion.from_pretrained(json.loads(json.dumps(model)), device="cpu", cpu_threads=1)


def mixed_rows() -> Iterator[list[Request]]:
    """Two rows of two lanes each time: other schedulers, numbers of steps, contexts, guidance and windows."""
    settings: list[dict[str, Any]] = [
        {"scheduler": "ddim", "num_inference_steps": 3, "contexts": 1, "guidance_scale": 4.0},
        {"scheduler": "dpmpp_2m", "num_inference_steps": 5, "contexts": 3, "guidance_scale": 2.0},
        {"scheduler": "euler", "num_inference_steps": 9, "contexts": 2, "control_guidance_end": 0.4},
        {"scheduler": "lcm", "num_inference_steps": 4, "contexts": 1, "context_scale": 0.3},
    ]
    for number, first in enumerate(settings):
        second = settings[(number + 1) % len(settings)]
        yield [
            replace(row(10 * number + k, control=["canny"], **dict(own)), id=str(k))
            for k, own in enumerate((first, second))
        ]


@torch.no_grad()
def test_a_step_is_one_graph_for_all_settings(small: ContextDiffusion) -> None:
    """For each variant: with control and without. A row with noise of its own has another graph, once."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(denoise, fullgraph=True, backend="eager")
    for control in (True, False):
        for rows in mixed_rows():
            group = small.backbone.shape_group(rows[0])
            step(small.backbone, _buffers(small, rows), group, Variant(control, rescaled=False))
    # With control and without, with noise and without.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


# Of one shape group: one to three contexts, weights and guidance of their own, any number of steps.
KLEIN: list[tuple[list[Size], dict[str, Any]]] = [
    ([(96, 64), (64, 128)], {"num_inference_steps": 3, "guidance_scale": 4.0}),
    ([(96, 64), (64, 64), (64, 64)], {"num_inference_steps": 9, "context_weights": [0.5, 2.0]}),
    ([(64, 64), (64, 64), (64, 64), (64, 64)], {"width": 96, "height": 64, "context_scale": 0.3}),
    ([(96, 64), (80, 80)], {"guidance_scale": 1.5}),
]


@torch.no_grad()
def test_a_step_of_klein_is_one_graph_for_a_shape_group(tmp_path: Path) -> None:
    """Over steps too."""
    folder = save_tiny_klein(tmp_path / "klein", distilled=False)
    klein = ContextDiffusion.from_pretrained(str(folder), device="cpu", cpu_threads=1)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(denoise, fullgraph=True, backend="eager")
    for sizes, settings in KLEIN:
        rows = klein_rows(klein, 2, sizes, **settings)
        group = klein.backbone.shape_group(rows[0])
        assert group == (4, 6, 64, True)
        buffers = _buffers(klein, rows)
        before = buffers.latents.clone()
        for _ in range(3):
            step(klein.backbone, buffers, group, Variant(controlled=False, rescaled=False))
        assert not torch.equal(buffers.latents, before)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def _buffers(pipeline: ContextDiffusion, rows: list[Request]) -> LaneBuffers:
    return buffers_of(chunk_of(pipeline, rows))


@pytest.mark.parametrize("kind", [pytest.param("cuda", marks=GPU)])
def test_no_step_waits_for_the_gpu(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is called nor one that is replayed."""
    monkeypatch.setattr("context_diffusion.engine.step.EAGER", 2)
    model = make_whole_model(tmp_path, False)
    pipeline = ContextDiffusion.from_pretrained(model, device=kind)
    chunk = chunk_of(pipeline, rows_of(4))
    chunk.step()  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chunk.step()  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunk.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
