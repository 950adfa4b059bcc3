"""Networks that are seldom used, kept in the host's memory where a GPU has no room for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Offload = Literal["auto", "off"]
WORKING_BYTES = 8 * 2**30  # beside the weights: activations, lane buffers, the decoder


def wants_offloading(offload: Offload, networks: Iterable[nn.Module], device: torch.device) -> bool:
    """Return whether encoders stay in the host's memory: with `auto` where the weights of all networks and
    the memory to work in are more than the GPU has."""
    if offload == "off" or device.type != "cuda":
        return False
    _, total = torch.cuda.mem_get_info(device)
    return needed_bytes(networks) > total


def needed_bytes(networks: Iterable[nn.Module]) -> int:
    """Return the bytes that a device needs for the weights of networks and to work in."""
    return WORKING_BYTES + sum(
        weight.nbytes for network in networks for weight in (*network.parameters(), *network.buffers())
    )


class Offloaded:
    """A network whose weights are on the device only while it is used. They are never changed, so nothing is
    copied back."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Keep the network, which is in the host's memory."""
        self.device = device
        pinned = device.type == "cuda"
        self._host = [
            (weight, weight.data.pin_memory() if pinned else weight.data)
            for weight in (*network.parameters(), *network.buffers())
        ]
        self._rest()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Return a context in which the weights are on the device."""
        for weight, values in self._host:
            weight.data = values.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for weight, values in self._host:
            weight.data = values
