"""The strength of a reference: its weight's logarithm is added to the attention's logits of its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from context_diffusion.core.errors import ErrorCode
from context_diffusion.core.records import Failure, Pixels
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.models.attention import ABSENT, log_weights
from context_diffusion.models.flux2.prompts import LENGTH
from context_diffusion.models.flux2.transformer import _attend
from support.klein_rows import (
    LEAST_LEVELS,
    MOST_LEVELS,
    KleinRow,
    assert_rows_equal_diffusers,
    klein_row,
    levels_apart,
    outcomes_of,
    request_of,
    results_of,
)

# The output and the query have 6 x 4 tokens, the contexts 4 x 4 and 5 x 5: 65 tokens of references.
ROW = klein_row(3, [(96, 64), (64, 64), (80, 80)], "a misty forest", num_inference_steps=4)
OUTPUT, QUERY, FIRST, SECOND, PADDING = 24, 24, 16, 25, 15


def image_of(models: Any, row: KleinRow) -> Pixels:
    [result] = results_of(models(True), [row], chunk=2)
    return result.image


def without(row: KleinRow, context: int) -> KleinRow:
    images = [image for number, image in enumerate(row.images) if number != context + 1]
    return replace(row, images=tuple(images))


@pytest.mark.parametrize(
    "settings",
    [
        {"context_weights": [1.0, 1.0]},
        {"context_scale": 1.0},
        {"context_weights": [2.0, 2.0], "context_scale": 0.5},
    ],
)
def test_a_weight_of_one_is_what_diffusers_makes(models: Any, pipes: Any, settings: dict[str, Any]) -> None:
    """The weight of a context is its own times that of all."""
    assert_rows_equal_diffusers(models(True), pipes(True), [ROW.but(**settings)])


@pytest.mark.parametrize("context", [0, 1])
def test_a_weight_of_zero_is_the_row_without_that_context(models: Any, context: int) -> None:
    """Bit for bit, beside rows that have it."""
    weights = [1.0, 1.0]
    weights[context] = 0.0
    rows = [ROW.but(context_weights=weights), without(ROW, context), ROW]
    zero, absent, whole = results_of(models(True), rows, chunk=2)
    assert np.array_equal(zero.image, absent.image)
    assert zero.full_prompt == absent.full_prompt
    assert levels_apart(zero.image, whole.image) > LEAST_LEVELS


def test_a_scale_of_zero_is_the_query_alone(models: Any) -> None:
    rows = [ROW.but(context_scale=0.0), ROW.but(context_weights=[0.0, 0.0])]
    first, second = results_of(models(True), rows, chunk=2)
    assert np.array_equal(first.image, second.image)
    assert first.full_prompt == "a misty forest"
    assert levels_apart(first.image, image_of(models, ROW)) > LEAST_LEVELS


def test_a_weight_between_is_between(models: Any) -> None:
    """Between the whole context and nearly none: without it the prompt names one image less."""
    images = [image_of(models, ROW.but(context_weights=[1.0, weight])) for weight in (1.0, 0.5, 0.1, 1e-4)]
    apart = [levels_apart(image, images[0]) for image in images[1:]]
    assert apart[0] > MOST_LEVELS
    means = [np.abs(image.astype(int) - images[0]).mean() for image in images[1:]]
    assert means == sorted(means)
    assert np.abs(images[2].astype(int) - images[3]).mean() < np.abs(images[1].astype(int) - images[3]).mean()
    scaled = image_of(models, ROW.but(context_scale=0.5))
    assert np.array_equal(scaled, image_of(models, ROW.but(context_weights=[0.5, 0.5])))


@pytest.mark.parametrize("weights", [(0.5, 1.0), (1.0, 3.0), (0.2, 0.7)])
def test_a_weight_is_diffusers_with_a_mask_of_logarithms(
    models: Any, pipes: Any, weights: tuple[float, float]
) -> None:
    [result] = results_of(models(True), [ROW.but(context_weights=list(weights))])
    counts = torch.tensor([LENGTH + OUTPUT + QUERY, FIRST, SECOND])
    mask = torch.tensor([1.0, *weights]).log().repeat_interleave(counts)[None, None, None]
    theirs = pipes(True)(
        image=list(ROW.images),
        prompt=result.full_prompt,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(3),
        attention_kwargs={"attention_mask": mask},
    ).images[0]
    assert levels_apart(result.image, np.asarray(theirs)) <= MOST_LEVELS
    assert levels_apart(result.image, image_of(models, ROW)) > MOST_LEVELS


@torch.inference_mode()
def test_each_token_of_a_reference_has_its_weights_logarithm(models: Any) -> None:
    backbone = models(True).backbone
    request = request_of(models(True), ROW.but(context_weights=[0.5, 2.0], context_scale=0.5))
    encoded = backbone.encode(request, backbone.branches(request), Cache(2**20))
    [lane] = encoded.lanes
    weights = [1.0, 0.25, 1.0, 0.0]
    counts = torch.tensor([LENGTH + OUTPUT + QUERY, FIRST, SECOND, PADDING])
    expected = log_weights(torch.tensor(weights)).repeat_interleave(counts)
    assert expected.min() == ABSENT
    assert torch.equal(lane["bias"], expected[None, None, None])


@torch.inference_mode()
def test_weights_multiply_the_attentions_exponentials() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 7, 3, 8, generator=generator)  # (P, S, h, D)
    weights = torch.tensor([[1.0, 1.0, 0.5, 0.5, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.0]])
    rope = torch.ones(2, 7, 1, 8), torch.zeros(2, 7, 1, 8)
    ours = _attend(query, key, value, rope, log_weights(weights)[:, None, None])

    def reference(lane: int, head: int) -> Tensor:
        logits = query[lane, :, head] @ key[lane, :, head].T / 8**0.5
        shares = logits.exp() * weights[lane]
        return (shares / shares.sum(1, keepdim=True)) @ value[lane, :, head]

    theirs = torch.stack([torch.cat([reference(lane, head) for head in range(3)], 1) for lane in range(2)])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0, 1.0]])
def test_a_wrong_number_of_weights_fails_its_row_alone(models: Any, weights: list[float]) -> None:
    failed, result = outcomes_of(models(True), [ROW.but(context_weights=weights), ROW])
    assert isinstance(failed, Failure)
    assert failed.code == ErrorCode.INVALID_SETTING
    assert failed.message == f"context_weights has {len(weights)} values for 2 contexts"
    assert not isinstance(result, Failure)
