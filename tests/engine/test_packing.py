"""Which rows go on: full chunks, nobody forgotten; and what a running engine makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.engine import Engine, StepUpdate
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.engine.model_calls import Shape
from context_diffusion.engine.packing import choose
from context_diffusion.inputs.context_images import SquareCrop

PIXELS = np.zeros((8, 8, 3), np.uint8)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=24), st.sampled_from([1, 2, 4, 8]), st.integers(1, 6))
def test_the_choice_is_the_best_there_is_and_the_first_is_in_it(
    lanes: list[int], chunk: int, chunks: int
) -> None:
    most = chunk * chunks
    chosen = choose(lanes, chunk, most)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    total = sum(lanes[i] for i in chosen)
    assert total <= max(most, lanes[0])
    sums = {lanes[0]}
    for more in lanes[1:]:
        sums |= {one + more for one in sums if one + more <= most}
    best = max(one / (math.ceil(one / chunk) * chunk) for one in sums)
    assert total / (math.ceil(total / chunk) * chunk) == pytest.approx(best)


class Numbers:
    """A backbone of almost no work at the real seam, so that thousands of rows can run; it counts what it is
    called with."""

    scheduler_config = {"beta_schedule": "linear", "prediction_type": "epsilon", "num_train_timesteps": 1000}
    image_size, context_slots, noise_scale, latent_channels, latent_factor = 8, 1, 1.0, 1, 8
    contexts, tiles = SquareCrop(8), True

    def __init__(self, room: int = 10**9) -> None:
        self.called, self.room = 0, room
        self.fails: dict[
            str, Callable[[str], Exception | None]
        ] = {}  # by what is called: an error for a row's id

    def branches(self, request: Request) -> list[Branch]:
        return guidance_branches(request.settings, has_prompt=True)

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        self._fail_at("encode", request)
        lanes = [{"row": torch.tensor([[float(request.id)]])} for _ in branches]
        return Encoded(lanes, None, [""] * len(branches), finish=lambda image: self._checked(image, request))

    def encode_query(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1)

    def control(self, *_: object) -> list[torch.Tensor]:
        raise AssertionError("no row has a control map")

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, lanes: Conditions, residuals: None
    ) -> torch.Tensor:
        if len(self.engine.slots) > self.room:
            raise torch.OutOfMemoryError("a device as small as this")
        self.called += len(latents)
        return latents * 0 + lanes["row"][:, :, None, None]

    def decode(self, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        self.in_tiles = tiled
        return latents.sigmoid().expand(1, 3, 8, 8)

    def _checked(self, image: torch.Tensor, request: Request) -> torch.Tensor:
        self._fail_at("decode in tiles" if self.in_tiles else "decode", request)
        return image

    def _fail_at(self, what: str, request: Request) -> None:
        if error := self.fails.get(what, lambda _: None)(request.id):
            raise error

    engine: Engine


def engine(shape: Shape = Shape(4, 12), room: int = 10**9) -> Engine:
    backbone = Numbers(room)
    backbone.engine = Engine(backbone, torch.device("cpu"), shape)
    return backbone.engine


def numbered(number: int, steps: int, lanes: int) -> Request:
    scales = {1: (1.0, 1.0), 2: (5.0, 5.0), 3: (5.0, 3.0)}[lanes]
    settings = Settings(
        seed=number, num_inference_steps=steps, guidance_scale=scales[0], context_guidance_scale=scales[1]
    )
    return Request(str(number), 0, PIXELS, (), (PIXELS,), "words", None, settings)


MIXES = {
    "uniform 20 to 50": lambda rng: int(rng.integers(20, 51)),
    "20, 30, 50": lambda rng: int(rng.choice([20, 30, 50])),
    "lognormal": lambda rng: int(np.clip(rng.lognormal(3.3, 0.4), 4, 150)),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("lanes", [[1, 2], [1, 2, 3], [2], [2, 3]])
def test_the_chunks_are_full_from_the_first_step_to_the_last(mix: str, lanes: list[int]) -> None:
    """Drain included, 50 rows a lane; counted at the calls of the model."""
    rng, busy = np.random.default_rng(0), engine()
    asked = [(MIXES[mix](rng), int(rng.choice(lanes))) for _ in range(600)]
    outcomes = [
        outcome for _, outcome in busy.run([numbered(number, *one) for number, one in enumerate(asked)])
    ]
    assert sum(isinstance(outcome, Result) for outcome in outcomes) == len(asked)
    used, paid = sum(steps * width for steps, width in asked), busy.backbone.called  # type: ignore[attr-defined]
    assert (busy.occupancy.used, busy.occupancy.paid) == (used, paid)
    assert used / paid >= 0.97


def test_no_row_starves() -> None:
    """A row of three lanes among ever new ones of two, which fill the chunks better without it."""
    busy = engine(Shape(4, 4))
    rows = [numbered(0, 10, 3), *(numbered(number, 10, 2) for number in range(1, 200))]
    ended = [row.id for row, _ in busy.run(rows)]
    assert ended.index("0") < 8


def test_what_rows_pay_adds_up_to_what_the_calls_had_room_for() -> None:
    busy = engine()
    results = [outcome for _, outcome in busy.run([numbered(n, 3 + n % 5, 1 + n % 3) for n in range(20)])]
    assert sum(r.paid_lane_steps for r in results if isinstance(r, Result)) == pytest.approx(
        busy.occupancy.paid
    )
    assert sum(r.used_lane_steps for r in results if isinstance(r, Result)) == busy.occupancy.used


def test_where_memory_is_short_fewer_rows_are_at_hand_and_none_is_lost_or_changed() -> None:
    rows = [numbered(number, 4 + number % 3, 2) for number in range(12)]
    plenty = {row.id: outcome for row, outcome in engine().run(rows)}
    short = {row.id: outcome for row, outcome in engine(room=2).run(rows)}
    assert set(short) == set(plenty)
    for name, outcome in short.items():
        assert isinstance(outcome, Result)
        assert np.array_equal(outcome.image, plenty[name].image)  # type: ignore[union-attr]
    outcomes = [outcome for _, outcome in engine(room=0).run(rows[:3])]
    assert [isinstance(one, Failure) and one.code for one in outcomes] == [ErrorCode.OUT_OF_MEMORY] * 3


def test_a_cancelled_row_frees_its_lanes_and_has_no_outcome() -> None:
    busy, rows = engine(), [numbered(number, 50, 3) for number in range(8)]
    busy.waiting.extend(rows)
    busy.step()
    for row in (rows[0], rows[7]):  # under way, and waiting
        busy.cancel(row)
    ended = {row.id for row, _ in busy.run([])}
    assert ended == {str(number) for number in range(1, 7)}
    assert busy.idle


def test_a_callback_hears_of_every_step_and_sees_a_preview() -> None:
    told: list[tuple[str, int, int]] = []

    def hear(progress: StepUpdate) -> None:
        told.append((progress.request.id, progress.step, progress.steps))
        assert progress.preview().shape == (8, 8, 3)

    busy = engine()
    busy.callback = hear
    list(busy.run([numbered(1, 3, 1), numbered(2, 2, 2)]))
    assert sorted(told) == [("1", 1, 3), ("1", 2, 3), ("1", 3, 3), ("2", 1, 2), ("2", 2, 2)]


def test_the_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    cache = Cache(3 * 400)
    for key in ("a", "b", "c", "a", "d"):
        cache.get(f"text:{key}", lambda: torch.zeros(100))
    assert cache.size <= cache.limit
    assert cache.hits["text"] == 1
    for key, hit in (("a", True), ("c", True), ("d", True), ("b", False)):
        before = cache.hits["text"]
        cache.get(f"text:{key}", lambda: torch.zeros(100))
        assert (cache.hits["text"] > before) == hit, key


def outcomes_of(busy: Engine, rows: list[Request]) -> dict[str, Result | Failure]:
    return {row.id: outcome for row, outcome in busy.run(rows)}


@pytest.mark.parametrize(
    "error", [KeyError("weights"), RuntimeError("shapes\ndiffer"), torch.OutOfMemoryError("small")]
)
def test_whatever_goes_wrong_at_one_rows_admission_is_that_rows_failure(error: Exception) -> None:
    busy = engine()
    busy.backbone.fails["encode"] = lambda row: error if row == "2" else None  # type: ignore[attr-defined]
    outcomes = outcomes_of(busy, [numbered(number, 3, 2) for number in range(5)])
    failed = outcomes.pop("2")
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
    assert isinstance(failed, Failure)
    expected = (
        ErrorCode.OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ErrorCode.ENGINE_ERROR
    )
    assert failed.code == expected
    assert "\n" not in failed.message


def test_a_lost_device_is_no_rows_failure() -> None:
    busy = engine()
    busy.backbone.fails["encode"] = lambda _: torch.AcceleratorError("device lost")  # type: ignore[attr-defined]
    with pytest.raises(torch.AcceleratorError):
        outcomes_of(busy, [numbered(0, 3, 1)])


def test_a_row_that_does_not_fit_beside_others_is_admitted_after_them() -> None:
    busy, seen = engine(), list[int]()

    def short(row: str) -> Exception | None:
        seen.append(len(busy.slots))
        return torch.OutOfMemoryError("small") if len(busy.slots) > 1 else None

    busy.backbone.fails["encode"] = short  # type: ignore[attr-defined]
    outcomes = outcomes_of(busy, [numbered(number, 3, 2) for number in range(5)])
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
    assert max(seen) == 2


def test_an_image_that_cannot_be_decoded_whole_is_decoded_in_tiles_and_says_so() -> None:
    busy = engine()
    busy.backbone.fails["decode"] = lambda row: torch.OutOfMemoryError("small") if row == "1" else None  # type: ignore[attr-defined]
    outcomes = outcomes_of(busy, [numbered(number, 3, 2) for number in range(3)])
    tiled = {row: outcome.vae_tiled for row, outcome in outcomes.items() if isinstance(outcome, Result)}
    assert tiled == {"0": False, "1": True, "2": False}


def test_an_image_that_fits_only_alone_waits_for_room_and_one_that_never_fits_fails_alone() -> None:
    busy = engine()

    def short(row: str) -> Exception | None:
        return torch.OutOfMemoryError("small") if row == "1" or busy.slots else None

    busy.backbone.fails |= {"decode": short, "decode in tiles": short}  # type: ignore[attr-defined]
    rows = [numbered(number, 3 + number, 2) for number in range(4)]
    outcomes = outcomes_of(busy, rows)
    failed = outcomes.pop("1")
    assert isinstance(failed, Failure)
    assert failed.code == ErrorCode.OUT_OF_MEMORY
    assert set(outcomes) == {"0", "2", "3"}
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
