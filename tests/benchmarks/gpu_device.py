"""The device of bench_gpu.py: seconds of calls, its rate of matrix products, its memory."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Measures on a GPU, or on a CPU to show that it runs. tiny: a small matrix product suffices."""

    device: torch.device
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the product loads a model here."""
        return torch.bfloat16 if self.is_gpu else torch.float32

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def matrix_rate(self) -> float:
        """Return the FLOP/s of a large matrix product."""
        side = 256 if self.tiny else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))

        def products() -> None:
            for _ in range(10):
                a @ b

        products()
        return 2 * side**3 * 10 / self.seconds(products)

    def free_memory(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> float:
        """Return GiB: those that torch reserved on a GPU, or those of the process so far."""
        if self.is_gpu:
            return torch.cuda.max_memory_reserved(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
