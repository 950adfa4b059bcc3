"""Calls of the model that run at once don't change one another's rows: through the engine of a job, for every
backbone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import PROMPT_TEMPLATE
from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.models.flux2.prompts import full_prompt
from context_diffusion.models.resolution.resolve import BUNDLED
from context_diffusion.pipeline import ContextDiffusion, make_engine
from support.diffusers_reference import Model, reference, row
from support.klein_rows import MOST_LEVELS, by_diffusers, klein_row, levels_apart, request_of
from support.threads import threads_that_switch_often
from support.tiny import picture, request, tiny_model
from support.tiny_diffusers import SIDE, make_base, make_controlnet, make_image_encoder, make_ip_adapter
from support.tiny_flux2 import save_tiny_klein
from support.tiny_loras import make_lora

RUNS = 20
THREADS = (2, 4)
# One to three contexts, guidance 1 to 5.
MIXED: list[dict[str, Any]] = [
    {"contexts": 1, "guidance_scale": 1.0, "scheduler": "euler", "num_inference_steps": 2},
    {"contexts": 2, "guidance_scale": 5.0, "prompt": "a red house", "num_inference_steps": 3},
    {
        "contexts": 3,
        "guidance_scale": 3.0,
        "prompt": "a boat",
        "negative_prompt": "grey",
        "num_inference_steps": 2,
    },
    {
        "contexts": 1,
        "guidance_scale": 2.0,
        "scheduler": "dpmpp_2m",
        "control_guidance_end": 0.6,
        "num_inference_steps": 3,
    },
]


def mask(seed: int) -> Pixels:
    """Return a mask of a context at the output's size: grey patches, of which the bright ones act."""
    return picture(seed, SIDE, SIDE)[..., :1].repeat(3, 2)


# What later settings of rows add: masks, blocks, LoRAs, image to image, windows of each ControlNet.
SETTINGS: list[dict[str, Any]] = [
    {"contexts": 2, "masks": (mask(1), mask(2)), "guidance_scale": 5.0, "num_inference_steps": 2},
    {"contexts": 2, "lora": "ink", "lora_scale": 0.5, "control_guidance_end": [0.4, 1.0]},
    {"strength": 0.7, "scheduler": "euler", "context_blocks": {"up": 1.0}},
    {
        "contexts": 3,
        "control": [],
        "guidance_rescale": 0.7,
        "negative_prompt": "grey",
        "num_inference_steps": 2,
    },
]


def generate(model: Any, rows: list[Request], threads: int, runs: int) -> list[list[Pixels]]:
    job = GenerateJob.model_validate(
        {
            "kind": "generate",
            "manifest": "m",
            "output": "o",
            "model": model,
            "cluster": {"cpu_threads": threads},
        }
    )
    engine = make_engine(job, pytest.fail)
    images = []
    for _ in range(runs):
        with threads_that_switch_often():
            results = engine.generate(rows)
        assert all(isinstance(result, Result) for result in results), results
        images.append([result.image for result in results if isinstance(result, Result)])
    return images


def assert_equal_bits(model: Any, rows: list[Request]) -> list[Pixels]:
    """-> the images of the rows, the same in all runs and at each number of threads."""
    [expected] = generate(model, rows, 1, 1)
    for threads in THREADS:
        for number, images in enumerate(generate(model, rows, threads, RUNS)):
            for index, (image, first) in enumerate(zip(images, expected, strict=True)):
                difference = np.abs(image.astype(int) - first.astype(int)).max()
                assert not difference, f"row {index}, run {number}, {threads} threads: {difference} of 255"
    return expected


@pytest.mark.parametrize(
    ("xl", "mixed"),
    [(False, MIXED), (True, MIXED), (False, SETTINGS)],
    ids=["sd15", "sdxl", "later settings"],
)
def test_threads_change_no_row_of_stable_diffusion_and_each_is_what_diffusers_makes(
    tmp_path: Path, xl: bool, mixed: list[dict[str, Any]]
) -> None:
    base = make_base(tmp_path, xl)
    model: Model = {
        "base": base,
        "controlnet": [make_controlnet(tmp_path, xl, seed) for seed in (1, 2)],
        "image_encoder": make_image_encoder(tmp_path),
        **make_ip_adapter(tmp_path, base, plus=True, xl=xl),
    }
    if mixed is SETTINGS:
        model["loras"] = {"ink": make_lora(tmp_path, base, "ink", 1)}
    rows = [row(number, **settings) for number, settings in enumerate(mixed)]
    for image, request_ in zip(assert_equal_bits(model, rows), rows, strict=True):
        _, theirs = reference(model, request_, xl)
        assert np.abs(image.astype(int) - theirs.astype(int)).max() <= 1, request_.id


def test_threads_change_no_row_of_klein_and_each_is_what_diffusers_makes(tmp_path: Path) -> None:
    folder = save_tiny_klein(tmp_path / "klein", distilled=False)
    model = ContextDiffusion.from_pretrained(str(folder), device="cpu")
    drawn = [
        klein_row(1, [(64, 64), (64, 64)], guidance_scale=1.0, num_inference_steps=2),
        klein_row(2, [(64, 64), (64, 80)], "a boat", guidance_scale=4.0, num_inference_steps=3),
        klein_row(3, [(64, 64), (80, 64), (64, 64)], guidance_scale=1.0, num_inference_steps=2),
        klein_row(4, [(64, 64), (64, 64)], "", guidance_scale=2.0, num_inference_steps=3),
    ]
    rows = [request_of(model, given, str(number)) for number, given in enumerate(drawn)]
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    for image, given in zip(assert_equal_bits(str(folder), rows), drawn, strict=True):
        told = full_prompt(PROMPT_TEMPLATE, given.prompt, len(given.images))
        theirs, _ = by_diffusers(pipe, given, told)
        assert levels_apart(image, theirs) <= MOST_LEVELS


def test_threads_change_no_row_of_the_native_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    rows = [
        request(1, contexts=1, prompt="ocean", guidance_scale=1.0),
        request(2, contexts=2, guidance_scale=5.0, num_inference_steps=4),
        request(3, contexts=3, prompt="dots", guidance_scale=3.0, context_guidance_scale=2.0),
        request(
            4, contexts=1, prompt="forest", guidance_scale=2.0, scheduler="dpmpp_2m", control_guidance_end=0.6
        ),
    ]
    assert_equal_bits(str(tmp_path / "model"), rows)


def strokes(seed: int) -> Pixels:
    """Return a context, (256, 256, 3), of diagonal strokes in several hues: it has a texture."""
    hues = picture(seed, 64, 64).repeat(4, 0).repeat(4, 1).astype(float)
    place = np.arange(256)[:, None] + np.arange(256) * (seed % 3 - 1)
    return (hues * (0.75 + 0.25 * np.sin(place / 1.5))[..., None]).astype(np.uint8)


def test_order_and_threads_change_no_row_of_the_bundled_model() -> None:
    """Its drafts transport colours, synthesise textures and recall looks, which a tiny model does not."""
    size = (128, 128)
    contexts = [tuple(strokes(seed) for seed in seeds) for seeds in ((1,), (2, 3), (4,), (5, 6, 7))]
    prompts = [None, "blue stripes", None, "green dots"]
    rows = [
        replace(request(number, prompt=prompt, size=size, num_inference_steps=2), contexts=shown)
        for number, (prompt, shown) in enumerate(zip(prompts, contexts, strict=True))
    ]
    [expected] = generate(str(BUNDLED), rows, 1, 1)
    assert len({image.tobytes() for image in expected}) == len(rows)
    for order, threads in (([3, 1, 0, 2], 1), ([0, 1, 2, 3], 2), ([2, 3, 1, 0], 2)):
        [images] = generate(str(BUNDLED), [rows[number] for number in order], threads, 1)
        for number, image in zip(order, images, strict=True):
            assert np.array_equal(image, expected[number]), f"row {number} of {order}, {threads} threads"


def test_threads_that_tokenize_at_once_change_no_prompt() -> None:
    """A tokenizer of the Rust library keeps padding and truncation as a state of its own."""
    model = tiny_model()
    prompts = ["dots", "dots " * 200]

    @torch.inference_mode()
    def encoded(number: int) -> tuple[torch.Size, bool]:
        prompt = prompts[number % 2]
        return model.encode_text([prompt])[0].shape, model.truncates(prompt)

    expected = [encoded(0), encoded(1)]
    assert [truncated for _, truncated in expected] == [False, True]
    with threads_that_switch_often(), ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(encoded, range(400))):
            assert found == expected[number % 2]
