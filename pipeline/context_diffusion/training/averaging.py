"""The averaged weights that a run ends with (exponential moving average), and the modules that carry them for a while."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def update_ema(average: dict[str, Tensor], modules: nn.Module, decay: float) -> None:
    now = {name: value for name, value in modules.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        torch._foreach_lerp_([average[name] for name in now], list(now.values()), 1 - decay)


class Averaged:
    """Within it the modules carry the averaged weights, and are in eval mode."""

    def __init__(self, modules: nn.Module, average: dict[str, Tensor]) -> None:
        self.modules, self.average = modules, average

    def __enter__(self) -> None:
        self.kept = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        self.modules.eval()

    def __exit__(self, *_: object) -> None:
        self.modules.load_state_dict(self.kept)
        self.modules.train()
