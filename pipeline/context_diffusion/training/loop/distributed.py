"""Data-parallel training: each process takes its share of every batch, and gradients are averaged.

Equal global batches give equal steps, whatever the number of workers. Knows torch.distributed, not who
started it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from context_diffusion.core.errors import ClusterError

Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Workers:
    """This process among `count`; the first one writes files."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Workers:
        """Return this process of the process group; the only worker if there is none."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Rows) -> Rows:
        """Return this worker's rows of a batch: an array, tensor or list."""
        return rows[self.rank :: self.count]  # type: ignore[index]

    def average(self, parameters: Iterable[torch.nn.Parameter], elapsed: float) -> float:
        """Average the gradients over the workers, in place; return the average of `elapsed`, so that all
        agree on it."""
        if self.count == 1:
            return elapsed
        owners = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
        flat = torch.cat([_flatten_dense_tensors(grads), torch.tensor([elapsed], device=grads[0].device)])
        _add_up(flat)
        flat /= self.count
        for owner, grad in zip(owners, _unflatten_dense_tensors(flat[:-1], grads), strict=True):
            owner.grad = grad
        return float(flat[-1])

    def exchange(self, tensors: Sequence[Tensor]) -> None:
        """Copy each tensor from the worker that owns it, which has it in `share(tensors)`, to all others, in
        place."""
        if self.count == 1 or not tensors:
            return
        flat = _flatten_dense_tensors(
            [
                tensor if i % self.count == self.rank else torch.zeros_like(tensor)
                for i, tensor in enumerate(tensors)
            ]
        )
        _add_up(flat)
        for tensor, whole in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(whole)

    def gather(self, share: Tensor, rows: int) -> Tensor:
        """Return the whole batch of so many rows from all workers' shares."""
        if self.count == 1:
            return share
        whole = share.new_zeros(rows, *share.shape[1:])
        whole[self.rank :: self.count] = share
        _add_up(whole)
        return whole


def _add_up(values: Tensor) -> None:
    """Sum values over all workers, in place. Raises ClusterError if one of them is gone."""
    try:
        distributed.all_reduce(values)
    except RuntimeError as error:  # gloo's and NCCL's
        raise ClusterError(f"another worker can no longer be reached: {error}") from error
