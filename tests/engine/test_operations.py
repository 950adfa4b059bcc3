"""What a job's rows cost is counted: as much as a counter around the whole run sees, and it changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from context_diffusion.engine.calls import Shape
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.operations import NotCounted, Operations
from context_diffusion.model.native_backbone import NativeBackbone
from context_diffusion.schema import Request, Result
from tiny import request, tiny_model

MODEL = tiny_model()


def engine(operations: Operations | None = None) -> Engine:
    torch.set_num_threads(1)
    return Engine(NativeBackbone(MODEL), torch.device("cpu"), Shape(2, 4), operations=operations or NotCounted())


def mixed() -> list[Request]:
    return [
        request(
            seed=n,
            contexts=1 + n % 2,
            prompt="ocean" if n % 3 else None,
            num_inference_steps=2 + n % 3,
            guidance_scale=1.0 + n % 2,
        )
        for n in range(6)
    ]


def results(busy: Engine, rows: list[Request]) -> list[Result]:
    made = {id(one): outcome for one, outcome in busy.run(rows)}
    assert all(isinstance(outcome, Result) for outcome in made.values())
    return [made[id(one)] for one in rows]  # type: ignore[misc]


def test_the_rows_costs_add_up_to_what_a_counter_around_the_run_sees_and_no_bit_changes() -> None:
    operations = Operations()
    counted = results(engine(operations), mixed())
    with FlopCounterMode(display=False) as counter:
        results(engine(), mixed())
    plain = results(engine(), mixed())
    assert operations.done == pytest.approx(counter.get_total_flops(), rel=0.01)  # a row's fusion is not counted
    assert sum(one.flops for one in counted) == pytest.approx(operations.done)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(counted, plain, strict=True))
    assert all(one.flops == one.reference_flops == 0 for one in plain)


@pytest.mark.parametrize(("guidance", "least", "most"), [(1.0, 0.4, 0.6), (3.0, 0.8, 1.0)])
def test_rows_without_guidance_cost_half_of_what_a_guided_batch_pays_for_them(guidance: float, least: float, most: float) -> None:
    rows = [request(seed=n, contexts=1, prompt="ocean", num_inference_steps=16, guidance_scale=guidance) for n in range(4)]
    made = results(engine(Operations()), rows)
    assert least < sum(one.flops for one in made) / sum(one.reference_flops for one in made) < most
