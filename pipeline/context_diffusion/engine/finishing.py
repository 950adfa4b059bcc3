"""A finished row becomes an image: decoded, checked for finite numbers and by the safety checker.

On a GPU nothing waits for it in the step: the decoder runs on a stream of its own, pixels and the finite flag
go to pinned memory, and another thread waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.records import Failure, Pixels, Result
from context_diffusion.engine.backbone import Backbone
from context_diffusion.engine.rows import Row

NOT_FINITE = Failure(ErrorCode.ENGINE_ERROR, "the latents are not finite: try a smaller guidance_scale")


class Inline(Executor):
    """Runs what is submitted at once, in the thread that submits it."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Finishing:
    """An image in the making, from latents (1, ...). The future raises an out-of-memory error of the
    decoder."""

    future: Future[Result | Failure]
    latents: Tensor
    tiled: bool


@dataclass
class Finisher:
    """Makes images of finished rows. pool: runs the decoder on a CPU. unsafe: the safety checker.
    compiled: the backbone's networks are."""

    backbone: Backbone
    device: torch.device
    pool: Executor
    unsafe: Callable[[Pixels], bool] | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if gpu else None
        self._waiting = ThreadPoolExecutor(1, "finish") if gpu else None

    def start(self, row: Row, latents: Tensor, tiled: bool = False) -> Finishing:
        """Begin to make a row's image. tiled: decode in tiles."""
        begin = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        return Finishing(begin(row, latents, tiled), latents, tiled)

    def _on_cpu(self, row: Row, latents: Tensor, tiled: bool) -> Future[Result | Failure]:
        return self.pool.submit(self._at_once, row, latents, tiled)

    def _on_gpu(self, row: Row, latents: Tensor, tiled: bool) -> Future[Result | Failure]:
        assert self._stream is not None
        assert self._waiting is not None
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self.device))
            latents.record_stream(self._stream)
            try:
                image, finite = self._image(row, latents, tiled)
            except torch.OutOfMemoryError as error:
                failed: Future[Result | Failure] = Future()
                failed.set_exception(error)
                return failed
            pixels, flag = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (image, finite))
            pixels.copy_(image, non_blocking=True)
            flag.copy_(finite, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        row.seconds += time.perf_counter() - began

        def wait() -> Result | Failure:
            copied.synchronize()
            return self._result(row, pixels, bool(flag), tiled)

        return self._waiting.submit(wait)

    @torch.inference_mode()
    def _at_once(self, row: Row, latents: Tensor, tiled: bool) -> Result | Failure:
        began = time.perf_counter()
        image, finite = self._image(row, latents, tiled)
        row.seconds += time.perf_counter() - began
        return self._result(row, image, bool(finite), tiled)

    def _image(self, row: Row, latents: Tensor, tiled: bool) -> tuple[Tensor, Tensor]:
        """Return uint8 (H, W, 3), and whether the latents are finite, both on the device."""
        image = decoded(self.backbone, row, latents, tiled)
        return image, latents.isfinite().all()

    def _result(self, row: Row, image: Tensor, finite: bool, tiled: bool) -> Result | Failure:
        if not finite:
            return NOT_FINITE
        began = time.perf_counter()
        pixels = image.numpy()
        unsafe = self.unsafe(pixels) if self.unsafe else None
        row.seconds += time.perf_counter() - began
        return Result(
            pixels,
            row.seconds,
            row.lanes,
            self.device.type,
            row.ready.encoded.truncated,
            row.used,
            row.paid,
            vae_tiled=tiled,
            unsafe=unsafe,
            chunk=row.size,
            compiled=self.compiled,
            unknown_words=row.ready.encoded.unknown_words,
            full_prompt=row.ready.encoded.full_prompt,
        )


def decoded(backbone: Backbone, row: Row, latents: Tensor, tiled: bool = False) -> Tensor:
    """Decode latents (1, ...) of a row and finish them as its encoding says: uint8 (H, W, 3)."""
    image = backbone.decode(latents, tiled)
    finish = row.ready.encoded.finish
    image = finish(image) if finish else image
    return (image[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
