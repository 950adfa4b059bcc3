"""One denoising step of all rows of a chunk, as one function: gather the coefficients, predict, add up the
guidance branches, update.

It reads and writes buffers alone, so it can be traced as one graph, captured as a CUDA graph and replayed.

P places
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone, Conditions
from context_diffusion.engine.lane_buffers import LaneBuffers

WARM_UP = 2  # steps before a capture: libraries load their kernels and workspaces in them


def denoise(backbone: Backbone, buffers: LaneBuffers, controlled: bool) -> None:
    """Move each row of the buffers one step on.

    controlled: whether ControlNets run; where they do not, all rows are outside of their control window."""
    b = buffers
    now = b.tables[b.places, b.step]
    time, scale, p, q, x, out, before, noise, window = now.view(
        *now.shape, *[1] * (b.latents.dim() - 1)
    ).unbind(1)
    outputs = backbone.predict(
        (b.latents * scale)[b.row_of_lane],
        time.flatten()[b.row_of_lane],
        b.lanes,
        _control(b, window.flatten()) if controlled else None,
    ).float()
    weights = b.weights.view(*b.weights.shape, *[1] * (b.latents.dim() - 1))
    output = (outputs[b.lanes_of_row] * weights).sum(1)
    latents = x * b.latents + out * output + before * b.x0
    if b.noise is not None:
        latents = latents + noise * b.noise[b.places, b.step]
    b.x0.copy_(p * b.latents + q * output)
    b.latents.copy_(latents)
    b.step.add_(b.active)


def _control(b: LaneBuffers, window: Tensor) -> Conditions:
    """Return the control of each lane's row, with the scale 0 outside of the row's control window."""
    assert b.control is not None, "a controlled row has been written"
    rows: Conditions = dict(b.control)
    scale = rows["scale"]
    assert isinstance(scale, Tensor)
    rows["scale"] = scale * window[:, None].to(scale.dtype)
    return {
        name: value[b.row_of_lane] if isinstance(value, Tensor) else tuple(v[b.row_of_lane] for v in value)
        for name, value in rows.items()
    }


class Stepper:
    """Runs `denoise` on a chunk's buffers: on a CPU by a call, on a GPU by replaying CUDA graphs, one for
    rows with control and one without."""

    def __init__(self, backbone: Backbone, buffers: LaneBuffers) -> None:
        self.backbone, self.buffers = backbone, buffers
        self._graphs: dict[bool, Any] = {}

    @torch.inference_mode()
    def __call__(self, controlled: bool) -> None:
        if self.buffers.device.type != "cuda":
            denoise(self.backbone, self.buffers, controlled)
            return
        if controlled not in self._graphs:
            self._graphs[controlled] = self._capture(controlled)
        self._graphs[controlled].replay()

    def forget(self) -> None:
        """Capture again before the next step, since a buffer has moved."""
        self._graphs.clear()

    def _capture(self, controlled: bool) -> Any:
        """Capture the step as a graph, after steps whose results are taken back."""
        changed = (self.buffers.latents, self.buffers.x0, self.buffers.step)
        kept = [buffer.clone() for buffer in changed]
        side = torch.cuda.Stream(self.buffers.device)
        side.wait_stream(torch.cuda.current_stream(self.buffers.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                denoise(self.backbone, self.buffers, controlled)
        torch.cuda.current_stream(self.buffers.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile: the finishing one does.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            denoise(self.backbone, self.buffers, controlled)
        for buffer, value in zip(changed, kept, strict=True):
            buffer.copy_(value)
        return graph


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Within it a row's bits don't depend on its place in a call. On a CPU: one thread of torch's, whose
    number changes them. On a GPU: no TF32, whose kernels add up in another order at another place (3 of 24
    rows, seen on an H200)."""
    if device.type == "cuda":
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
