"""Prompts of FLUX.2 [klein]: what the model is told, and its hidden states, are those of diffusers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from context_diffusion.core.model_parts import PROMPT_TEMPLATE
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.models.flux2.prompts import LAYERS, LENGTH, full_prompt
from context_diffusion.pipeline import ContextDiffusion
from support.klein_rows import (
    LEAST_LEVELS,
    KleinRow,
    assert_rows_equal_diffusers,
    klein_row,
    levels_apart,
    request_of,
    results_of,
)
from support.klein_variants import with_text_layers
from support.threads import threads_that_switch_often

PROMPTS = ["", "a misty forest", "größer {prompt} 花 <|im_end|> <think>", "words " * 120]
ROLE = "Keep the exact composition of image 1. Render it in the style, palette and texture of"


@torch.inference_mode()
def states_by_diffusers(pipe: Flux2KleinPipeline, prompt: str) -> torch.Tensor:
    return pipe._get_qwen3_prompt_embeds(pipe.text_encoder, pipe.tokenizer, prompt)


@torch.inference_mode()
def assert_states_equal(model: ContextDiffusion, pipe: Flux2KleinPipeline) -> None:
    text: Any = model.backbone
    states = [text.text(prompt) for prompt in PROMPTS]
    for prompt, ours in zip(PROMPTS, states, strict=True):
        assert ours.shape == (1, LENGTH, 3 * 16)
        torch.testing.assert_close(ours, states_by_diffusers(pipe, prompt), rtol=1e-5, atol=1e-5)
    assert all((state - states[0]).abs().max() > 0.1 for state in states[1:])


def test_states_are_diffusers_although_later_layers_are_removed(models: Any, pipes: Any) -> None:
    """The saved text encoder has 28 layers."""
    assert_states_equal(models(True), pipes(True))


@pytest.mark.parametrize("layers", [27, 30])
def test_states_are_diffusers_whatever_the_number_of_layers(
    folders: dict[bool, Path], tmp_path: Path, layers: int
) -> None:
    copy = with_text_layers(folders[True], tmp_path / "copy", layers)
    model = ContextDiffusion.from_pretrained(str(copy), device="cpu", cpu_threads=1)
    pipe = Flux2KleinPipeline.from_pretrained(copy)
    assert_states_equal(model, pipe)
    row = klein_row(1, [(64, 64), (64, 64)], num_inference_steps=2)
    assert_rows_equal_diffusers(model, pipe, [row])


def test_layers_that_are_not_read_are_not_there(models: Any) -> None:
    ran: list[int] = []
    encoder = models(True).backbone.text.encoder
    hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in encoder.layers]
    with torch.inference_mode():
        models(True).backbone.text("a boat")
    for hook in hooks:
        hook.remove()
    assert len(ran) == len(encoder.layers) == LAYERS[-1]


@pytest.mark.parametrize(
    ("references", "told"),
    [
        (1, "a boat"),
        (2, f"{ROLE} image 2; copy no objects from them. a boat"),
        (3, f"{ROLE} images 2 to 3; copy no objects from them. a boat"),
        (4, f"{ROLE} images 2 to 4; copy no objects from them. a boat"),
    ],
)
def test_the_prompt_names_the_references(models: Any, references: int, told: str) -> None:
    assert full_prompt(PROMPT_TEMPLATE, "a boat", references) == told
    row = klein_row(1, [(64, 64)] * max(references, 2), "a boat", num_inference_steps=1)
    [result] = results_of(models(True), [row.but(context_scale=0.0) if references == 1 else row])
    assert result.full_prompt == told


def test_without_a_prompt_the_model_is_told_the_role_alone() -> None:
    role = f"{ROLE} image 2; copy no objects from them."
    assert full_prompt(PROMPT_TEMPLATE, None, 2) == full_prompt(PROMPT_TEMPLATE, "", 2) == role
    assert full_prompt(PROMPT_TEMPLATE, None, 1) == ""


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{prompt}", "a {prompt} in {styles}"),
        ("{prompt}, as {styles}", "a {prompt} in {styles}, as image 2"),
        ("{{x}} {prompt} {prompt}", "{x} a {prompt} in {styles} a {prompt} in {styles}"),
    ],
)
def test_a_template_of_ones_own_is_what_the_model_is_told(
    folders: dict[bool, Path], pipes: Any, template: str, told: str
) -> None:
    """Braces of a prompt are no fields."""
    model = ContextDiffusion.from_pretrained(
        {"base": str(folders[True]), "prompt_template": template}, device="cpu", cpu_threads=1
    )
    row = klein_row(1, [(64, 64), (64, 64)], "a {prompt} in {styles}", num_inference_steps=2)
    [result] = assert_rows_equal_diffusers(model, pipes(True), [row])
    assert result.full_prompt == told


def letters(models: Any, tokens: int) -> KleinRow:
    """Return a row whose prompt has so many tokens, with all that is put around it: the tiny tokenizer has
    one for each byte."""
    text = models(True).backbone.text
    row = klein_row(1, [(64, 64), (64, 64)], "", num_inference_steps=2)
    around = len(text.tokenizer(text._chat(full_prompt(PROMPT_TEMPLATE, "x", 2)))["input_ids"]) - 1
    return replace(row, prompt="y" * (tokens - around))


def test_a_prompt_that_is_cut_is_told(models: Any, pipes: Any) -> None:
    fits, longer = letters(models, LENGTH), letters(models, LENGTH + 1)
    far = replace(longer, prompt=f"{longer.prompt}, and a red house that nobody reads of")
    results = assert_rows_equal_diffusers(models(True), pipes(True), [fits, longer, far], chunk=2)
    assert [result.prompt_truncated for result in results] == [False, True, True]
    told = [result.full_prompt or "" for result in results]
    assert told[2].endswith("nobody reads of"), "what the model was told is written whole"
    other = replace(fits, prompt=f"z{str(fits.prompt)[1:]}")
    [changed] = results_of(models(True), [other], chunk=2)
    assert levels_apart(changed.image, results[0].image) > LEAST_LEVELS


def test_a_negative_prompt_that_is_cut_is_told(models: Any) -> None:
    row = replace(klein_row(1, [(64, 64), (64, 64)], num_inference_steps=1), negative_prompt="grey " * 200)
    [result] = results_of(models(False), [row])
    assert result.prompt_truncated


class CountingEncoder:
    """Stands for the text encoder, which takes long: its states are the tokens."""

    embed_tokens = torch.nn.Embedding(1, 1)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids[..., None].float()] * (LAYERS[-1] + 1))


def test_threads_that_tokenize_at_once_change_no_prompt(models: Any) -> None:
    """A tokenizer of the Rust library keeps padding and truncation as a state of its own."""
    text = copy.copy(models(True).backbone.text)
    text.encoder = CountingEncoder()
    prompts = ["a boat", "words " * 200]
    expected = {prompt: (text(prompt), text.truncates(prompt)) for prompt in prompts}
    assert [truncated for _, truncated in expected.values()] == [False, True]

    def is_as_expected(number: int) -> bool:
        prompt = prompts[number % 2]
        tokens, truncated = text(prompt), text.truncates(prompt)
        return torch.equal(tokens, expected[prompt][0]) and truncated == expected[prompt][1]

    with threads_that_switch_often(), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_as_expected, range(1000)))


def test_what_repeats_is_encoded_once(models: Any) -> None:
    engine = models(False).engine()
    rows = [klein_row(5, [(64, 64), (80, 80)], num_inference_steps=1).but(seed=seed) for seed in range(4)]
    outcomes = list(engine.run([request_of(models(False), row, str(n)) for n, row in enumerate(rows)]))
    assert len(outcomes) == 4
    assert engine.cache.misses == {"text": 2, "reference": 2, "positions": 1}
    assert engine.cache.hits == {"text": 6, "reference": 6, "positions": 3}


@torch.inference_mode()
def test_guidance_is_against_the_negative_prompt_or_an_empty_one(models: Any) -> None:
    """Without the template: it belongs to the prompt."""
    backbone = models(False).backbone
    row = klein_row(1, [(64, 64), (64, 64)], "a boat", num_inference_steps=1)
    for negative, read in ((None, ""), ("", ""), ("grey", "grey")):
        request = request_of(models(False), replace(row, negative_prompt=negative))
        encoded = backbone.encode(request, backbone.branches(request), Cache(2**24))
        against, prompt = (lane["text"] for lane in encoded.lanes)
        expected = backbone.transformer.context_embedder(backbone.text(read))
        assert np.array_equal(against, expected)
        assert not np.array_equal(prompt, expected)
