"""One denoising step of all rows of a chunk, as one function: gather the coefficients, predict, add up the
guidance branches, update.

It reads and writes buffers alone, so it can be traced as one graph, captured as a CUDA graph and replayed.

P places
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from context_diffusion.engine.backbone import Backbone, Conditions
from context_diffusion.engine.lane_buffers import LaneBuffers

AHEAD = 2  # steps
EAGER = 8  # steps of a chunk before its step is captured, which few rows of a rare size are not worth


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
    rows with control and one without, after some steps by calls."""

    def __init__(self, backbone: Backbone, buffers: LaneBuffers, captures: Captures) -> None:
        self.backbone, self.buffers, self.captures = backbone, buffers, captures
        self._graphs: dict[bool, Any] = {}
        self._calls: Counter[bool] = Counter()

    @torch.inference_mode()
    def __call__(self, controlled: bool) -> None:
        if self.captures.stream is None:
            self._denoise(controlled)
            return
        if controlled not in self._graphs and self._calls[controlled] < EAGER:
            self._calls[controlled] += 1
            self._on_stream(controlled, self.captures.stream)
            return
        if controlled not in self._graphs:
            self._graphs[controlled] = self.captures.capture(lambda: self._denoise(controlled))
        self._graphs[controlled].replay()

    def forget(self) -> None:
        """Capture again before the next step, since a buffer has moved."""
        self._graphs.clear()

    def _denoise(self, controlled: bool) -> None:
        denoise(self.backbone, self.buffers, controlled)

    def _on_stream(self, controlled: bool, stream: torch.cuda.Stream) -> None:
        """Call the step on the stream of captures: libraries load their kernels and workspaces for it."""
        current = torch.cuda.current_stream(self.buffers.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._denoise(controlled)
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
