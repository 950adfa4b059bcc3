from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from context_diffusion.training.loop.precision import has_bfloat16, mixed_precision


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc/cpuinfo")
def test_bfloat16_is_used_where_the_processor_has_it() -> None:
    known = Path("/proc/cpuinfo").read_text().split()
    has = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(known))
    assert has_bfloat16(torch.device("cpu")) == has
    with mixed_precision(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has else torch.float32)
    assert has_bfloat16(torch.device("cuda"))
