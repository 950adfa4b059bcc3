"""The project's own data for the diffusion stage: a pool after the other, encoded when it is first asked for."""

from __future__ import annotations

from context_diffusion.model.native import NativeModel
from context_diffusion.schema import Pixels, Request
from context_diffusion.training.batches import SAMPLE_SETTINGS, Source
from context_diffusion.training.config import SMALL
from context_diffusion.training.encoded import Encoded, encode_pool
from context_diffusion.training.pools import Pools
from context_diffusion.training.samples import pool_requests


class Generated:
    def __init__(self, model: NativeModel, pools: Pools, pool_steps: int) -> None:
        self.model, self.pools, self.pool_steps = model, pools, pool_steps
        # The weights of a frozen encoder are in no checkpoint: another one of the same shape would not be noticed.
        self.origin = {} if model.context_encoder == SMALL else {"context_encoder": model.context_encoder}
        self._encoded: tuple[int, Encoded] | None = None

    def at(self, step: int) -> Encoded:
        number = step // self.pool_steps
        if self._encoded is None or self._encoded[0] != number:
            self._encoded = (number, encode_pool(self.model, self.pools.at(10_000 + number)))
        return self._encoded[1]

    def validations(self) -> dict[str, Source]:
        return {"validation": encode_pool(self.model, self.pools.validation())}

    def examples(self, count: int) -> tuple[list[Request], list[Pixels]]:
        pool = self.pools.validation()
        requests, targets = pool_requests(pool, count, SAMPLE_SETTINGS)
        return requests, list(pool.targets[targets])
