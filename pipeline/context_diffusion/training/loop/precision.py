"""Mixed precision on devices that have bfloat16: a processor that emulates it takes about fifty times as
long."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

# Backends of attention. cuDNN's, torch's own choice on an H100 and H200, has a backward pass that gives NaN
# (pytorch issue 196678).
SOUND = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes bfloat16 natively."""
    if device.type != "cpu":
        return True
    # Older versions of torch do not report it: then float32.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context: matrix products and convolutions in bfloat16 on a device that has it, float32
    elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
