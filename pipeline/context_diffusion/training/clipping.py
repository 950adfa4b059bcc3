"""Gradients made bounded, and those of a step that are no numbers left out: they would end up in every weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from context_diffusion.errors import ModelError

LARGEST = 1.0  # norm of a step's gradients
LOOK = 25  # steps from one look at what was left out to the next


class Clipping:
    """Nothing here waits for a GPU but `left_out`. All workers agree, for they have the same gradients."""

    def __init__(self, measured: Sequence[nn.Parameter], others: Sequence[nn.Parameter], device: torch.device) -> None:
        """others: not bounded, but left out with the measured ones."""
        self.measured, self.others = measured, others
        self._count = torch.zeros((), dtype=torch.long, device=device)

    def bound(self) -> None:
        """Of a step that has one gradient that is no number all become 0."""
        broken = ~nn.utils.clip_grad_norm_(self.measured, LARGEST).isfinite()
        self._count += broken
        for parameter in (*self.measured, *self.others):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(broken, 0.0)

    def left_out(self) -> int:
        """Steps since the last look. Raises ModelError where they were most of LOOK."""
        count = int(self._count)
        self._count.zero_()
        if count > LOOK // 2:
            raise ModelError(
                f"the gradients of {count} of the last {LOOK} steps are not finite, nothing is learned any more: lower "
                "learning_rate and matrix_learning_rate. The last checkpoint is whole, and the same command goes on from it"
            )
        return count
