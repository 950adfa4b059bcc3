"""What the training tests leave out to be quick: a pool is made once, a validation looks at one batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from context_diffusion.training import diffusion
from context_diffusion.training.data import pools


@pytest.fixture(autouse=True, scope="session")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pools, "make_pool", cache(pools.make_pool))
        patched.setattr(diffusion, "VALIDATION_BATCHES", 1)
        yield
