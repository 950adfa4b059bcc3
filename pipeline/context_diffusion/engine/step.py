"""One denoising step of all rows of a chunk, as one function: gather the coefficients, predict, add up the
guidance branches, update.

It reads and writes buffers alone, so it can be traced as one graph, captured as a CUDA graph and replayed.

P places
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone, Conditions
from context_diffusion.engine.lane_buffers import LaneBuffers

AHEAD = 2  # steps
COLUMNS = 8  # of a row's table, before those of the control windows
EAGER = 8  # steps of a chunk before its step is captured, which few rows of a rare size are not worth


class Variant(NamedTuple):
    """What a step does beside the rest, where a row needs it.

    controlled: ControlNets run; without, all rows are outside of their control windows. rescaled: the guided
    output is rescaled; without, no row has a guidance_rescale."""

    controlled: bool
    rescaled: bool


def denoise(backbone: Backbone, buffers: LaneBuffers, group: Hashable, variant: Variant) -> None:
    """Move each row of the buffers, all of one shape group, one step on."""
    b = buffers
    now = b.tables[b.places, b.step]
    columns, windows = now[:, :COLUMNS], now[:, COLUMNS:]
    time, scale, p, q, x, out, before, noise = columns.view(
        *columns.shape, *[1] * (b.latents.dim() - 1)
    ).unbind(1)
    outputs = backbone.predict(
        (b.latents * scale)[b.row_of_lane],
        time.flatten()[b.row_of_lane],
        b.lanes,
        _control(b, windows) if variant.controlled else None,
        group,
    ).float()
    weights = b.weights.view(*b.weights.shape, *[1] * (b.latents.dim() - 1))
    output = (outputs[b.lanes_of_row] * weights).sum(1)
    if variant.rescaled:
        output = _rescaled(output, outputs[b.last_lane], b.rescale)
    latents = x * b.latents + out * output + before * b.x0
    if b.noise is not None:
        latents = latents + noise * b.noise[b.places, b.step]
    b.x0.copy_(p * b.latents + q * output)
    b.latents.copy_(latents)
    b.step.add_(b.active)


def _rescaled(guided: Tensor, conditional: Tensor, rescale: Tensor) -> Tensor:
    """Scale guided outputs (P, ...) towards the std of the conditional ones (Lin et al. 2023, arXiv
    2305.08891, section 3.4), by rescale (P,) from 0, not at all, to 1."""
    rescale = rescale.view(-1, *[1] * (guided.dim() - 1))
    axes = list(range(1, guided.dim()))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    # An unused place has no std: its ratio is no number.
    return torch.where(rescale > 0, guided * (rescale * ratio + (1 - rescale)), guided)


def _control(b: LaneBuffers, windows: Tensor) -> Conditions:
    """Return the control of each lane's row, with the scale 0 outside of a ControlNet's window. windows: (P,
    N), 0 or 1."""
    assert b.control is not None, "a controlled row has been written"
    rows: Conditions = dict(b.control)
    scale = rows["scale"]
    assert isinstance(scale, Tensor)
    rows["scale"] = scale * windows.to(scale.dtype)
    return {
        name: value[b.row_of_lane] if isinstance(value, Tensor) else tuple(v[b.row_of_lane] for v in value)
        for name, value in rows.items()
    }


class Captures:
    """What the CUDA graphs of an engine share: their memory, since they run one after the other and leave
    nothing in it, and the stream on which they are captured."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = torch.cuda.Stream(device) if on_gpu else None

    def capture(self, call: Callable[[], None]) -> Any:
        """Return a graph of a call. Raises what the call raises."""
        graph, errors = torch.cuda.CUDAGraph(), list[Exception]()
        try:
            # Other threads of the process may allocate meanwhile: the finishing one does.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                try:
                    call()
                except Exception as error:  # the end of the capture may hide it behind another one
                    errors.append(error)
                    raise
        except Exception:
            if errors:
                raise errors[0] from None
            raise
        return graph


class Stepper:
    """Runs `denoise` on a chunk's buffers: on a CPU by a call, on a GPU by replaying CUDA graphs, one for
    each variant, after some steps by calls."""

    def __init__(self, backbone: Backbone, buffers: LaneBuffers, group: Hashable, captures: Captures) -> None:
        self.backbone, self.buffers, self.group, self.captures = backbone, buffers, group, captures
        self._graphs: dict[Variant, Any] = {}
        self._calls: Counter[Variant] = Counter()

    @torch.inference_mode()
    def __call__(self, variant: Variant) -> None:
        if self.captures.stream is None:
            self._denoise(variant)
            return
        if variant not in self._graphs and self._calls[variant] < EAGER:
            self._calls[variant] += 1
            self._on_stream(variant, self.captures.stream)
            return
        if variant not in self._graphs:
            self._graphs[variant] = self.captures.capture(lambda: self._denoise(variant))
        self._graphs[variant].replay()

    def forget(self) -> None:
        """Capture again before the next step, since a buffer has moved."""
        self._graphs.clear()

    def _denoise(self, variant: Variant) -> None:
        denoise(self.backbone, self.buffers, self.group, variant)

    def _on_stream(self, variant: Variant, stream: torch.cuda.Stream) -> None:
        """Call the step on the stream of captures: libraries load their kernels and workspaces for it."""
        current = torch.cuda.current_stream(self.buffers.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._denoise(variant)
        current.wait_stream(stream)


class Pace:
    """Keeps the host at most AHEAD steps ahead of a GPU: it is never idle, and times are those of steps."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def stepped(self) -> None:
        if not self._on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > AHEAD:
            self._events.popleft().synchronize()


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Ensure that a row's bits do not depend on its place in a call: on a CPU by one thread of torch, whose
    number changes them; on a GPU without TF32, whose kernels add up in another order at another place (3 of
    24 rows, seen on an H200)."""
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
