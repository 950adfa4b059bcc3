"""Rows of FLUX.2 [klein] never see one another: whatever stands beside a row, its bits are the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.records import Pixels
from context_diffusion.models.flux2.references import FINEST, STEPS, padded_length
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

# Four of one shape group, with 49 to 61 tokens of references, and one of another group.
GROUP: list[KleinRow] = [
    klein_row(10, [(96, 64), (64, 128)], num_inference_steps=3),
    klein_row(11, [(100, 70), (64, 64), (70, 79)], "blue stripes", num_inference_steps=2),
    klein_row(12, [(96, 64), (80, 80)], "", num_inference_steps=4),
    klein_row(13, [(64, 64), (80, 80), (80, 64)], None, width=96, height=64, num_inference_steps=2),
]
ROWS: list[KleinRow] = [*GROUP, klein_row(14, [(64, 64), (64, 80)], "a red house", num_inference_steps=3)]
GUIDANCE = (1.0, 4.0, 1.0, 100.0, 2.5)
# By the number of threads.
ORDERS: dict[int, list[list[int]]] = {
    1: [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 1, 3], [0, 2]],
    2: [[2, 0, 4, 1, 3], [4, 3, 2, 1, 0]],
    4: [[2, 0, 4, 1, 3], [0, 1, 2, 3, 4]],
}


def with_threads(model: ContextDiffusion, threads: int) -> ContextDiffusion:
    """Return the same model with so many threads, and with the chunks of a GPU too."""
    same = ContextDiffusion(
        model.backbone, "flux2", torch.device("cpu"), cpu_threads=threads, defaults=model.defaults
    )
    same.chunks = (2, 1, 4)
    return same


def images_of(model: ContextDiffusion, rows: list[KleinRow], chunk: int) -> list[Pixels]:
    results = results_of(model, rows, chunk)
    assert {result.chunk for result in results} == {chunk}
    return [result.image for result in results]


@pytest.mark.parametrize("chunk", [2, 4])
@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "base"])
def test_neighbours_order_and_threads_change_no_bit_of_a_row(
    models: Any, distilled: bool, chunk: int
) -> None:
    rows = ROWS
    if not distilled:
        rows = [row.but(guidance_scale=scale) for row, scale in zip(ROWS, GUIDANCE, strict=True)]
    alone = [images_of(with_threads(models(distilled), 1), [row], chunk)[0] for row in rows]
    assert min(levels_apart(alone[0], other) for other in alone[1:]) > LEAST_LEVELS
    for threads, orders in ORDERS.items():
        model = with_threads(models(distilled), threads)
        for order in orders:
            images = images_of(model, [rows[number] for number in order], chunk)
            for number, image in zip(order, images, strict=True):
                assert np.array_equal(image, alone[number]), f"row {number} of {order}, {threads} threads"


def test_rows_whose_references_have_slightly_different_sizes_share_calls(models: Any, pipes: Any) -> None:
    """And each is what diffusers makes of it alone, without padding."""
    model = with_threads(models(True), 1)
    groups = {model.backbone.shape_group(request_of(model, row)) for row in GROUP}
    assert groups == {(4, 6, 64, True)}
    results = assert_rows_equal_diffusers(model, pipes(True), GROUP, chunk=4)
    assert sum(result.paid_lane_steps for result in results) == pytest.approx(4 * 4)


def test_without_padding_each_row_is_what_diffusers_makes_too(models: Any, pipes: Any) -> None:
    """As on a GPU, where one lane fills a chunk."""
    model = with_threads(models(True), 1)
    backbone: Any = copy.copy(model.backbone)
    model.backbone, backbone.padded = backbone, False
    groups = {backbone.shape_group(request_of(model, row)) for row in GROUP}
    assert groups == {(4, 6, tokens, False) for tokens in (49, 56, 61)}
    assert_rows_equal_diffusers(model, pipes(True), GROUP, chunk=1)


def test_rows_without_padding_and_weights_attend_without_a_bias(models: Any) -> None:
    model = models(True)
    exact = klein_row(1, [(64, 128), (64, 64)])
    assert model.backbone.shape_group(request_of(model, exact)) == (8, 4, 48, False)
    weighted = exact.but(context_weights=[0.5])
    assert model.backbone.shape_group(request_of(model, weighted)) == (8, 4, 48, True)
    without = request_of(model, replace(exact, images=exact.images[:1] * 2, settings=exact.settings))
    assert model.backbone.shape_group(without) == (8, 4, 64, False)


@given(st.integers(1, 5 * 2**14))
def test_padding_is_at_most_an_eighth_of_the_tokens(tokens: int) -> None:
    padded = padded_length(tokens)
    assert tokens <= padded < tokens + max(FINEST, tokens / STEPS + 1)
    assert padded % FINEST == 0
    assert padded_length(padded) == padded
    assert padded_length(tokens + 1) >= padded


def test_references_of_all_sizes_are_padded_to_few() -> None:
    """Four references of 1024 x 1024 pixels have 16,384 tokens."""
    assert len({padded_length(tokens) for tokens in range(1, 4 * 4096 + 1)}) <= 70
