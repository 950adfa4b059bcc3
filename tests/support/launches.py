"""What a denoising step costs beside arithmetic: calls that launch a kernel on a GPU, copies to the device
and reads of tensors on the host; of the engine, and of diffusers' own pipeline for the same rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from context_diffusion.core.records import Request
from context_diffusion.engine.chunk import Chunk
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.lane_buffers import LaneBuffers
from context_diffusion.engine.preparation import prepare
from context_diffusion.engine.rows import Row
from context_diffusion.engine.step import Captures, Variant, denoise
from context_diffusion.pipeline import ContextDiffusion
from support.diffusers_reference import Model, pipeline_of, row
from support.klein_rows import Size, klein_row, request_of
from support.klein_variants import with_transformer
from support.tiny_diffusers import make_base, make_controlnet, make_image_encoder, make_ip_adapter
from support.tiny_flux2 import save_tiny_klein

WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh", "alias"}
WITHOUT_KERNEL |= {"new_empty", "new_empty_strided"}
HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}


class Calls(TorchDispatchMode):
    """Counts ATen calls: `launches` that run a kernel, `copies` from one device to another, `reads` of a
    tensor's numbers on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.launches = self.copies = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        if name in HOST_READS:
            self.reads += 1
        elif not _is_view(func) and name not in WITHOUT_KERNEL:
            self.launches += 1
            self.names[name] += 1
        if name in ("_to_copy", "copy_", "copy"):
            devices = {value.device for value in (*args, result) if isinstance(value, torch.Tensor)}
            self.copies += len(devices) > 1
        return result


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def make_whole_model(folder: Path, xl: bool) -> Model:
    """All layers of Stable Diffusion, narrow, with a ControlNet and an IP-Adapter."""
    base = make_base(folder, xl, whole=True)
    return {
        "base": base,
        "controlnet": [make_controlnet(folder, xl, whole=True)],
        "image_encoder": make_image_encoder(folder),
        **make_ip_adapter(folder, base, xl=xl),
    }


def make_whole_klein(folder: Path, distilled: bool = True) -> Path:
    """All layers of FLUX.2 [klein] 4B, narrow."""
    tiny = save_tiny_klein(folder / "tiny", distilled)
    return with_transformer(tiny, folder / "klein", num_layers=5, num_single_layers=20)


def rows_of(count: int, contexts: int = 2) -> list[Request]:
    """Guided rows."""
    asked = [
        row(number, contexts=contexts, control=["canny"], guidance_scale=4.0, num_inference_steps=4)
        for number in range(count)
    ]
    return [replace(request, id=str(number)) for number, request in enumerate(asked)]


def klein_rows(
    pipeline: ContextDiffusion, count: int, sizes: Sequence[Size] = ((64, 64),) * 3, **settings: Any
) -> list[Request]:
    """Rows of FLUX.2 [klein], each with references of its own. sizes: of the references, the query first."""
    settings = {"num_inference_steps": 4} | settings
    return [
        request_of(pipeline, klein_row(number, list(sizes), **settings), str(number))
        for number in range(count)
    ]


def chunk_of(pipeline: ContextDiffusion, requests: list[Request]) -> Chunk:
    """Place rows in a chunk that they fill."""
    backbone, cache = pipeline.backbone, Cache(2**30)
    branches = [backbone.branches(request) for request in requests]
    size = sum(map(len, branches))
    chunk = Chunk(
        backbone.shape_group(requests[0]), size, backbone, pipeline.device, Captures(pipeline.device)
    )
    for order, (request, of_row) in enumerate(zip(requests, branches, strict=True)):
        placed = Row(request, order, chunk.group, of_row, size)
        placed.prepared = prepare(placed, backbone, cache)
        chunk.place(placed)
    return chunk


@torch.no_grad()
def calls_of_a_step(pipeline: ContextDiffusion, requests: list[Request]) -> Calls:
    """Count the calls of one step of the engine. The model is of no use afterwards.

    Copies and reads are counted on torch's meta device, where the host is another one as it is for a GPU."""
    chunk = chunk_of(pipeline, requests)
    buffers = buffers_of(chunk)
    of_chunk = chunk.group, Variant(controlled=buffers.control is not None, rescaled=False)
    denoise(pipeline.backbone, buffers, *of_chunk)  # what is made once
    with Calls() as calls:
        denoise(pipeline.backbone, buffers, *of_chunk)
    for network in (*pipeline.backbone.denoisers, getattr(pipeline.backbone, "model", None)):
        if hasattr(network, "to"):
            network.to("meta")
    for name, value in vars(buffers).items():
        setattr(buffers, name, _on_meta(value))
    denoise(pipeline.backbone, buffers, *of_chunk)
    with Calls() as on_device:
        denoise(pipeline.backbone, buffers, *of_chunk)
    calls.copies, calls.reads = on_device.copies, calls.reads + on_device.reads
    return calls


def _on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_on_meta, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def buffers_of(chunk: Chunk) -> LaneBuffers:
    assert chunk._stepper is not None
    return chunk._stepper.buffers


def launches_of_diffusers(model: Model, requests: list[Request], xl: bool) -> int:
    """Count the launches of one step of diffusers' pipeline, the rows in one batch. It takes contexts for the
    whole batch: those of the first row."""
    pipe = pipeline_of(json.dumps(model), xl, True, False)
    pipe.controlnet = getattr(pipe.controlnet, "nets", [pipe.controlnet])[0]  # several take no batch
    told: dict[str, Any] = {
        "prompt": [request.prompt or "" for request in requests],
        "negative_prompt": [""] * len(requests),
        "image": [Image.fromarray(request.controls[0].pixels) for request in requests],
        "ip_adapter_image": [[Image.fromarray(context) for context in requests[0].contexts]],
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    return _launches_of_a_step(pipe, told)


def launches_of_diffusers_klein(folder: Path, requests: list[Request]) -> int:
    """Count the launches of one step of diffusers' Flux2KleinPipeline, the rows in one batch. It takes one
    set of references for the whole batch: those of the first row."""
    pipe = diffusers.Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    first = requests[0]
    told: dict[str, Any] = {
        "prompt": [request.prompt or "" for request in requests],
        "image": [Image.fromarray(image) for image in (first.query, *first.contexts)],
        "guidance_scale": first.settings.guidance_scale,
        "output_type": "latent",
    }
    return _launches_of_a_step(pipe, told)


def _launches_of_a_step(pipe: Any, told: dict[str, Any]) -> int:
    """Count the launches that one step more takes."""
    counts = []
    for steps in (2, 3):
        with Calls() as calls:
            pipe(**told, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0))
        counts.append(calls.launches)
    return counts[1] - counts[0]
