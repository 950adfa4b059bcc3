"""Mixed precision where it is faster: a processor without bfloat16 instructions takes some fifty times as long with it."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

# Of attention. cuDNN's, torch's own choice on an H100 and H200, has a backward pass that gives NaN (pytorch issue 196678).
SOUND = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed, not imitated, there."""
    if device.type != "cpu":
        return True
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones of torch do not tell: float32 then
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context: matrix products and convolutions in bfloat16 on a device that has it, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
