"""Mixed precision where it is faster: a processor without bfloat16 instructions takes some fifty times as long with it."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed, not imitated, there."""
    if device.type != "cpu":
        return True
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones of torch do not tell: float32 then
    return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context: matrix products and convolutions in bfloat16 on a device that has it, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
