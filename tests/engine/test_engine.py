"""Same row, same image; every row its own settings; and each input of a row moves its picture."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.model_parts import CHUNKS
from context_diffusion.core.records import Control, Failure, Pixels, Request, Result
from context_diffusion.engine.engine import Engine
from context_diffusion.engine.scheduler_tables import SAMPLERS
from context_diffusion.engine.service import EngineService
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.draft import TEXTURED, Look, draft
from context_diffusion.models.native.draft_image import give_back
from context_diffusion.models.native.lane_drafts import NativeDrafts
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import model_folder
from support.tiny import GPU, picture, request, speaking_model, tiny_model


def engine(chunk: int = 4, threads: int = 1, model: Callable[[], NativeModel] = tiny_model) -> Engine:
    return Engine(NativeBackbone(model()), torch.device("cpu"), (chunk,), threads=threads)


def alone(one: Request, model: Callable[[], NativeModel] = tiny_model) -> Pixels:
    [(_, outcome)] = list(engine(model=model).run([one]))
    assert isinstance(outcome, Result), outcome
    return outcome.image


def moved(first: Pixels, second: Pixels) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


rows = st.builds(
    request,
    seed=st.integers(0, 50),
    contexts=st.integers(1, 4),
    prompt=st.sampled_from([None, "ocean", "dots forest"]),
    size=st.sampled_from([(64, 64), (64, 96)]),
    num_inference_steps=st.integers(1, 4),
    scheduler=st.sampled_from([name for name in SAMPLERS if name != "flow_euler"]),
    guidance_scale=st.sampled_from([1.0, 2.0]),
    context_guidance_scale=st.sampled_from([None, 1.0, 3.0]),
    control=st.sampled_from(["gray", "canny", "none", "soft_edges", "disabled"]),
    strength=st.sampled_from([None, 0.6]),
)


@settings(max_examples=8, deadline=None)
@given(st.lists(rows, min_size=2, max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_a_row_is_the_same_alone_and_among_any_neighbours(
    batch: list[Request], calls: int, threads: int
) -> None:
    """However many calls run at once, and whatever torch's own number of threads."""
    batch = [dataclasses.replace(one, id=str(number)) for number, one in enumerate(batch)]
    torch.set_num_threads(threads)
    together = {one.id: outcome for one, outcome in engine(4, calls, speaking_model).run(batch)}
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert set(together) == {one.id for one in batch}
    for one in batch[:3]:
        outcome = together[one.id]
        assert isinstance(outcome, Result), outcome
        assert np.array_equal(outcome.image, alone(one, speaking_model))


BASE: dict[str, Any] = {
    "seed": 3,
    "contexts": 2,
    "prompt": "ocean",
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 2},
        {"guidance_scale": 6.0},
        {"context_guidance_scale": 6.0},
        {"prompt": "dots forest"},
        {"contexts": 1},
        {"controlnet_conditioning_scale": 0.0},
        {"control_guidance_end": 0.3},
        {"control": "canny"},
        {"context_weights": [1.0, 0.0]},
        {"strength": 0.5},
    ],
)
def test_each_setting_moves_the_picture(change: dict[str, Any]) -> None:
    assert moved(alone(request(**BASE)), alone(request(**(BASE | change)))) > 0


def test_query_contexts_and_seed_move_the_picture() -> None:
    base = request(**BASE)
    before = alone(base)
    assert moved(before, alone(dataclasses.replace(base, controls=(Control("gray", picture(77)),)))) > 0
    assert moved(before, alone(dataclasses.replace(base, contexts=(picture(88),)))) > 0
    assert moved(before, alone(request(**(BASE | {"seed": 4})))) > 0


def test_a_look_that_words_recall_moves_the_picture_in_its_own_lane() -> None:
    base = request(**BASE)
    assert moved(alone(base), alone(base, speaking_model)) > 0
    silent = dataclasses.replace(base, prompt=None)
    assert moved(alone(silent), alone(silent, speaking_model)) == 0
    led = request(**(BASE | {"context_guidance_scale": 3.0}))
    assert moved(alone(led), alone(led, speaking_model)) == 0


def test_the_order_of_contexts_changes_no_bit_and_a_weight_of_nothing_is_absence() -> None:
    base = request(**(BASE | {"contexts": 3}))
    turned = dataclasses.replace(base, contexts=base.contexts[::-1])
    assert np.array_equal(alone(base), alone(turned))
    without = dataclasses.replace(base, contexts=base.contexts[:2])
    weighted = dataclasses.replace(
        base, settings=base.settings.model_copy(update={"context_weights": [1.0, 1.0, 0.0]})
    )
    assert np.array_equal(alone(without), alone(weighted))


@torch.inference_mode()
def test_the_engine_is_a_plain_diffusers_loop() -> None:
    """The same row by hand: diffusers' scheduler, guidance as in the paper, no slots, no tables, no lanes."""
    one = request(**(BASE | {"contexts": 1, "guidance_scale": 3.0, "context_guidance_scale": 2.0}))
    model = tiny_model()
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(4)
    pixels = torch.from_numpy(np.stack([one.contexts[0], one.controls[0].pixels]).copy()).permute(0, 3, 1, 2)
    contexts = torch.zeros(1, 8, 4, 32)
    contexts[0, 0] = model.encode_images(pixels[:1])[0]
    weights = torch.zeros(1, 8)
    conditions = []
    for prompt, shown in (("", 0.0), ("", 1.0), ("ocean", 1.0)):
        weights[0, 0] = shown
        conditions.append(model.fuse(*model.encode_text([prompt]), contexts, weights))
    latents = (
        torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3)) * model.noise_scale
    )
    layout = model.encode_control(pixels[1:], ["gray"])
    look = Look(*(part[:, None] for part in model.look(pixels[:1])))
    seen = draft(model.layout(pixels[1:], ["gray"]), look, torch.ones(1, 1))
    image = NativeDrafts(model).image_of(one)
    seen[:, TEXTURED] = 2 * image - 1
    drafts = [model.encode_draft(seen * 0), model.encode_draft(seen), model.encode_draft(seen)]
    for timestep in scheduler.timesteps:
        time = timestep[None].float()
        down, mid = model.control(latents, time, layout)
        e0, e_context, e_both = (
            model.predict(latents, time, h, b, down, mid, drawn)
            for (h, b), drawn in zip(conditions, drafts, strict=True)
        )
        guided = e0 + 2.0 * (e_context - e0) + 3.0 * (e_both - e_context)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    image = give_back(model.decode(latents), image, model.decode(drafts[1].latents), 1.0, model.rest_scale)
    byhand = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    assert moved(alone(one), byhand) <= 1


def test_a_row_that_cannot_be_made_fails_alone() -> None:
    good, bad = request(1), request(2, contexts=9)
    wrong = request(3, contexts=2, context_weights=[1.0])
    outcomes = {one.id: outcome for one, outcome in engine().run([bad, good, wrong])}
    assert isinstance(outcomes["row-1"], Result)
    assert isinstance(outcomes["row-2"], Failure)
    assert outcomes["row-2"].code == ErrorCode.TOO_MANY_CONTEXTS
    assert isinstance(outcomes["row-3"], Failure)
    assert "context_weights" in outcomes["row-3"].message


def test_contexts_are_encoded_once() -> None:
    shared = picture(5)
    batch = [dataclasses.replace(request(seed), contexts=(shared,)) for seed in range(6)]
    busy = engine()
    list(busy.run(batch))
    assert busy.cache.misses["context"] == 1


def test_the_service_answers_each_caller_in_its_order_and_breaks_loudly() -> None:
    from concurrent.futures import ThreadPoolExecutor

    service = EngineService(engine())
    batches = [
        [request(seed, num_inference_steps=1 + seed % 3) for seed in range(start, start + 4)]
        for start in (0, 10, 20)
    ]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(service.generate, batches))
    for batch, outcomes in zip(batches, answers, strict=True):
        for one, outcome in zip(batch, outcomes, strict=True):
            assert isinstance(outcome, Result)
            assert np.array_equal(outcome.image, alone(one))


def test_nobody_waits_for_a_broken_engine() -> None:
    """Those whose rows are under way, those in the inbox, and those who come later all get the error."""
    began, go = threading.Event(), threading.Event()
    broken: list[BaseException] = []

    class Lost:
        idle = False

        def add(self, request: Request) -> None:
            began.set()

        def step(self) -> list[Any]:
            if began.is_set():
                go.wait(10)
                raise RuntimeError("the device is lost")
            return []

    lost = Lost()
    service = EngineService(lost, broken.append)  # type: ignore[arg-type]
    errors: list[str] = []

    def call() -> None:
        with pytest.raises(RuntimeError) as caught:
            service.generate([request(1)])
        errors.append(str(caught.value))

    callers = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    callers[0].start()
    assert began.wait(10)
    callers[1].start()
    while service._inbox.empty():
        time.sleep(0.01)
    go.set()
    for caller in callers:
        caller.join(10)
    call()
    assert errors == ["the device is lost"] * 3
    assert len(broken) == 1


def test_an_engine_tells_of_its_rows_and_caches() -> None:
    made = engine()
    assert (made.stats().rows, made.stats().hits, made.stats().gpu_bytes) == (0, {}, None)
    same = request(1, contexts=2, num_inference_steps=2)
    for one in (same, dataclasses.replace(same, id="another")):
        made.add(one)
    while made.stats().hits.get("context", 0) < 2:  # they are prepared beside the steps
        made.step()
    told = made.stats()
    assert told.rows == 2
    assert told.hits["context"] == 2
    assert told.misses["context"] == 2
    while not made.idle:
        made.step()
    assert made.stats().rows == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_engine_on_a_gpu_tells_of_its_memory() -> None:
    made = Engine(NativeBackbone(tiny_model().to(torch.device("cuda"))), torch.device("cuda"), (2,))
    list(made.run([request(1)]))
    assert (made.stats().gpu_bytes or 0) > 0


def pictures(backbone: NativeBackbone, device: torch.device, asked: list[Request]) -> dict[str, Pixels]:
    found = Engine(backbone, device, CHUNKS["native", device.type]).run(asked)
    return {row.id: outcome.image for row, outcome in found if isinstance(outcome, Result)}


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_bundled_model_makes_equal_bits_in_any_order_and_alone(kind: str) -> None:
    device, count = torch.device(kind), 24 if kind == "cuda" else 4
    backbone = NativeBackbone(NativeModel.from_pretrained(model_folder("bundled")).to(device))
    steps = [
        {"num_inference_steps": 2 + number % 4, "guidance_scale": 1.0 if number % 3 else 3.0}
        for number in range(count)
    ]
    rows = [
        dataclasses.replace(request(seed, **own), contexts=(picture(1000 + seed, 128, 128),))
        for seed, own in enumerate(steps)
    ]
    whole = pictures(backbone, device, rows)
    assert len(whole) == count
    for again in (rows, rows[::-1], rows[:1], rows[2:3]):
        assert all(
            np.array_equal(image, whole[name]) for name, image in pictures(backbone, device, again).items()
        )
