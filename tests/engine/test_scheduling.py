"""Which chunks go on: full ones, nobody forgotten; and what a running engine makes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Failure, Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.engine.backbone import Conditions, Encoded
from context_diffusion.engine.chunk import ChunkSizes
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.guidance import Branch, guidance_branches
from context_diffusion.engine.rows import StepUpdate
from context_diffusion.engine.scheduling import Option, Patience, choose, fitting
from context_diffusion.inputs.context_images import SquareCrop

PIXELS = np.zeros((8, 8, 3), np.uint8)


@given(st.lists(st.integers(1, 3), max_size=24), st.integers(0, 16))
def test_rows_fill_the_room_as_well_as_any_choice_of_them(lanes: list[int], room: int) -> None:
    taken = fitting(lanes, room)
    assert taken == sorted(set(taken))
    sums = {0}
    for more in lanes:
        sums |= {total + more for total in sums if total + more <= room}
    assert sum(lanes[number] for number in taken) == max(sums)
    strict = fitting(lanes, room, in_order=True)
    assert strict == list(range(len(strict))), "none goes before one that does not fit"


@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.booleans(), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_the_overdue_row_goes_first_and_then_the_fullest_chunks(
    drawn: list[tuple[float, bool, bool]], count: int
) -> None:
    options = [Option("group", 4, None, fill, order, recent) for order, (fill, recent, _) in enumerate(drawn)]
    chosen = choose(options, count, None)
    assert len(chosen) == min(count, len(options))
    assert min(option.fill for option in chosen) >= max(
        [option.fill for option in options if option not in chosen], default=0
    )
    for order in range(len(options)):
        assert choose(options, count, order)[0].oldest == order


def test_the_oldest_row_is_overdue_after_the_limit_and_until_it_has_ended() -> None:
    patience = Patience(3)
    for _ in range(3):
        assert patience.overdue(7) is None
        patience.stepped(advanced=False)
    for _ in range(5):
        assert patience.overdue(7) == 7
        patience.stepped(advanced=True)
    assert patience.overdue(8) is None
    assert patience.longest == 3


def test_chunks_shrink_by_their_table_and_grow_back_more_rarely_each_time() -> None:
    sizes = ChunkSizes((16, 8, 2))
    assert [sizes.of(lanes) for lanes in (1, 3, 16)] == [16, 16, 16]
    with pytest.raises(RowError, match="more than the 16 lanes"):
        sizes.of(17)
    pauses = []
    for _ in range(3):
        sizes.shrink(16)
        assert (sizes.of(1), sizes.of(3), sizes.of(9)) == (8, 8, 16)
        pauses.append(1)
        while not sizes.stepped():
            pauses[-1] += 1
        assert sizes.of(1) == 16
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1]
    for size in (16, 8, 2):
        sizes.shrink(size)
    assert sizes.limit == 2


class Numbers:
    """A backbone of almost no work at the real seam, so that thousands of rows can run; it counts what it is
    called with, and has room for so many lanes a call."""

    scheduler_config = {"beta_schedule": "linear", "prediction_type": "epsilon", "num_train_timesteps": 1000}
    image_size, context_slots, noise_scale = 8, 1, 1.0
    contexts, tiles, denoisers, num_controlnets = SquareCrop(8), True, (), 0

    def __init__(self, room: int = 10**9) -> None:
        self.called, self.room = 0, room
        self.called_with: set[int] = set()
        # By what is called: an error for a row's id.
        self.fails: dict[str, Callable[[str], Exception | None]] = {}
        self._tiled = threading.local()

    def branches(self, request: Request) -> list[Branch]:
        return guidance_branches(request.settings, has_prompt=True)

    def shape_group(self, request: Request) -> tuple[int, ...]:
        return request.query.shape[:2]

    def schedule(self, request: Request) -> dict[str, Any]:
        return {}

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return 1, request.query.shape[0] // 8, request.query.shape[1] // 8

    def encode(self, request: Request, branches: list[Branch], cache: Cache) -> Encoded:
        self._fail_at("encode", request)
        lanes: list[Conditions] = [{"row": torch.tensor([[float(request.id)]])} for _ in branches]
        return Encoded(lanes, None, finish=lambda image: self._checked(image, request))

    def encode_query(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(1, *self.latent_shape(request))

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        lanes: Any,
        control: Conditions | None,
        group: Any,
    ) -> torch.Tensor:
        assert control is None, "no row has a control map"
        if len(latents) > self.room:
            raise torch.OutOfMemoryError("a device as small as this")
        self.called += len(latents)
        self.called_with.add(len(latents))
        return latents * 0 + lanes["row"][:, :, None, None]

    def decode(self, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        self._tiled.value = tiled
        return latents.sigmoid().repeat_interleave(8, 2).repeat_interleave(8, 3).expand(1, 3, -1, -1)

    def _checked(self, image: torch.Tensor, request: Request) -> torch.Tensor:
        self._fail_at("decode in tiles" if self._tiled.value else "decode", request)
        return image

    def _fail_at(self, what: str, request: Request) -> None:
        if error := self.fails.get(what, lambda _: None)(request.id):
            raise error


class Counting(Engine):
    """An engine on a backbone of numbers."""

    backbone: Numbers  # type: ignore[assignment]


def engine(sizes: tuple[int, ...] = (4, 2, 1), room: int = 10**9, **options: Any) -> Counting:
    return Counting(Numbers(room), torch.device("cpu"), sizes, **options)  # type: ignore[arg-type]


def numbered(number: int, steps: int, lanes: int, size: tuple[int, int] = (8, 8)) -> Request:
    scales = {1: (1.0, 1.0), 2: (5.0, 5.0), 3: (5.0, 3.0)}[lanes]
    settings = Settings(
        seed=number, num_inference_steps=steps, guidance_scale=scales[0], context_guidance_scale=scales[1]
    )
    query = np.zeros((*size, 3), np.uint8)
    return Request(str(number), 0, query, (), (PIXELS,), "words", None, settings)


MIXES = {
    "uniform 20 to 50": lambda rng: int(rng.integers(20, 51)),
    "lognormal": lambda rng: int(np.clip(rng.lognormal(3.3, 0.4), 4, 150)),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("lanes", [[1, 2], [1, 2, 3], [2], [2, 3]])
def test_the_chunks_are_full_from_the_first_step_to_the_last(mix: str, lanes: list[int]) -> None:
    """Drain included; counted at the calls of the model."""
    rng, busy = np.random.default_rng(0), engine((16,))
    asked = [(MIXES[mix](rng), int(rng.choice(lanes))) for _ in range(400)]
    outcomes = [
        outcome for _, outcome in busy.run([numbered(number, *one) for number, one in enumerate(asked)])
    ]
    assert sum(isinstance(outcome, Result) for outcome in outcomes) == len(asked)
    used, paid = sum(steps * width for steps, width in asked), busy.backbone.called
    assert (busy.occupancy.used, busy.occupancy.paid) == (used, paid)
    assert used / paid >= 0.95


def test_no_row_starves() -> None:
    """A row of three lanes among ever new ones of two, which fill the chunks better without it."""
    busy = engine((4,), max_wait=20)
    rows = [numbered(number, 10, 2) for number in range(100)]
    rows.insert(4, numbered(100, 10, 3))
    ended = [row.id for row, _ in busy.run(rows)]
    assert ended.index("100") < 20


@pytest.mark.parametrize("threads", [1, 2])
def test_nine_sizes_fill_their_chunks_and_no_row_waits_over_the_bound(threads: int) -> None:
    """32 rows of each of nine sizes, in a random order; the drain at the end is included."""
    rng, busy = np.random.default_rng(3), engine((4,), threads=threads, max_wait=300)
    sizes = [(8 * (1 + number // 3), 8 * (1 + number % 3)) for number in range(9)] * 32
    rng.shuffle(sizes)
    rows = [
        numbered(number, int(rng.integers(10, 31)), 1, (height, width))
        for number, (height, width) in enumerate(sizes)
    ]
    assert sum(isinstance(outcome, Result) for _, outcome in busy.run(rows)) == len(rows)
    assert busy.occupancy.share >= 0.95
    assert busy.patience.longest <= 300


def test_a_row_of_a_rare_size_waits_no_longer_than_the_bound() -> None:
    busy = engine((4,), max_wait=15)
    rows = [numbered(number, 10, 1) for number in range(120)]
    rows.insert(2, numbered(200, 10, 1, (16, 16)))
    ended = [row.id for row, _ in busy.run(rows)]
    assert 2 < ended.index("200") < 20
    assert busy.patience.longest == 15


def test_what_rows_pay_adds_up_to_what_the_calls_had_room_for() -> None:
    busy = engine()
    results = [outcome for _, outcome in busy.run([numbered(n, 3 + n % 5, 1 + n % 3) for n in range(20)])]
    assert sum(r.paid_lane_steps for r in results if isinstance(r, Result)) == pytest.approx(
        busy.occupancy.paid
    )
    assert sum(r.used_lane_steps for r in results if isinstance(r, Result)) == busy.occupancy.used


@pytest.mark.parametrize("threads", [1, 2])
def test_where_memory_is_short_chunks_are_smaller_and_no_row_is_lost_or_changed(threads: int) -> None:
    rows = [numbered(number, 4 + number % 3, 1 + number % 2) for number in range(24)]
    plenty = outcomes_of(engine((16, 8, 4, 2, 1)), rows)
    busy = engine((16, 8, 4, 2, 1), room=8, threads=threads)
    short = outcomes_of(busy, rows)
    assert set(short) == set(plenty)
    assert busy.backbone.called_with == {8}
    for name, outcome in short.items():
        before = plenty[name]
        assert isinstance(outcome, Result)
        assert isinstance(before, Result)
        assert np.array_equal(outcome.image, before.image)
        assert (before.chunk, outcome.chunk) == (16, 8)


def test_a_row_whose_lanes_fit_into_no_chunk_fails_and_the_others_do_not() -> None:
    rows = [numbered(number, 4, 1 + number % 3) for number in range(9)]
    outcomes = outcomes_of(engine((16, 8, 4, 2, 1), room=2), rows)
    failed = {row for row, outcome in outcomes.items() if isinstance(outcome, Failure)}
    assert failed == {"2", "5", "8"}, "those of three lanes"
    assert {outcomes[row].code for row in failed} == {ErrorCode.OUT_OF_MEMORY}  # type: ignore[union-attr]
    assert set(outcomes_of(engine(room=0), rows[:3])) == {"0", "1", "2"}


def test_room_grows_back_after_some_steps() -> None:
    busy = engine((4, 2), room=2)
    first = outcomes_of(busy, [numbered(number, 10, 1) for number in range(4)])
    busy.backbone.room = 4
    later = outcomes_of(busy, [numbered(number, 10, 1) for number in range(200)])
    chunks = [outcome.chunk for outcome in (*first.values(), *later.values()) if isinstance(outcome, Result)]
    assert len(chunks) == 204
    assert chunks[0] == 2
    assert chunks[-1] == 4


def test_a_cancelled_row_frees_its_lanes_and_has_no_outcome() -> None:
    busy, rows = engine(), [numbered(number, 50, 3) for number in range(8)]
    for row in rows:
        busy.add(row)
    while not busy.chunks or not busy.chunks[0].rows:
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
    busy.backbone.fails["encode"] = lambda row: error if row == "2" else None
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
    busy.backbone.fails["encode"] = lambda _: torch.AcceleratorError("device lost")
    with pytest.raises(torch.AcceleratorError):
        outcomes_of(busy, [numbered(0, 3, 1)])


def test_a_row_that_does_not_fit_beside_others_is_admitted_after_them() -> None:
    busy, seen = engine(), list[int]()

    def short(row: str) -> Exception | None:
        placed = sum(len(chunk.rows) for chunk in busy.chunks)
        seen.append(placed)
        return torch.OutOfMemoryError("small") if placed > 1 else None

    busy.backbone.fails["encode"] = short
    outcomes = outcomes_of(busy, [numbered(number, 3, 2) for number in range(5)])
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
    assert max(seen) <= 2


def test_an_image_that_cannot_be_decoded_whole_is_decoded_in_tiles_and_says_so() -> None:
    busy = engine()
    busy.backbone.fails["decode"] = lambda row: torch.OutOfMemoryError("small") if row == "1" else None
    outcomes = outcomes_of(busy, [numbered(number, 3, 2) for number in range(3)])
    tiled = {row: outcome.vae_tiled for row, outcome in outcomes.items() if isinstance(outcome, Result)}
    assert tiled == {"0": False, "1": True, "2": False}


def test_an_image_that_fits_only_alone_waits_for_room_and_one_that_never_fits_fails_alone() -> None:
    busy = engine()

    def short(row: str) -> Exception | None:
        return (
            torch.OutOfMemoryError("small")
            if row == "1" or any(chunk.rows for chunk in busy.chunks)
            else None
        )

    busy.backbone.fails |= {"decode": short, "decode in tiles": short}
    rows = [numbered(number, 3 + number, 2) for number in range(4)]
    outcomes = outcomes_of(busy, rows)
    failed = outcomes.pop("1")
    assert isinstance(failed, Failure)
    assert failed.code == ErrorCode.OUT_OF_MEMORY
    assert set(outcomes) == {"0", "2", "3"}
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
