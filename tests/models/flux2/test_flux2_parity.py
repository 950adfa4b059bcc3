"""A row of any mixed batch of FLUX.2 [klein] is the image that diffusers' own pipeline makes of that row
alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from context_diffusion.engine.scheduler_tables import make_table
from context_diffusion.models.flux2.prompts import LENGTH
from context_diffusion.models.flux2.references import positions
from context_diffusion.models.flux2.transformer import LaneTokens, rotation
from context_diffusion.models.flux2.transformer import predict as predict_tokens
from support.klein_rows import (
    LEAST_LEVELS,
    MOST_LATENTS,
    MOST_LEVELS,
    KleinRow,
    assert_rows_equal_diffusers,
    by_diffusers,
    klein_row,
    levels_apart,
    request_of,
    results_of,
)
from support.tiny_flux2 import klein_reference, tiny_images

# Several sizes of outputs, references and numbers of references. Rows 0 to 2 share a shape group.
MIXED: list[KleinRow] = [
    klein_row(0, [(96, 64), (64, 128)], num_inference_steps=4),
    klein_row(1, [(100, 70), (64, 64), (70, 79)], "", num_inference_steps=2),
    klein_row(2, [(96, 64), (80, 80)], "blue stripes", num_inference_steps=6),
    klein_row(3, [(64, 128), (300, 200), (96, 64)], None, num_inference_steps=3),
    klein_row(4, [(80, 80), (64, 128), (100, 70), (64, 64)], "x", width=96, height=80, num_inference_steps=5),
    klein_row(5, [(128, 64), (64, 128)], "a red house by the sea", width=64, height=112),
    klein_row(6, [(64, 64), (64, 64), (64, 64), (64, 64)], "{prompt} {styles}", num_inference_steps=2),
    klein_row(7, [(300, 200), (100, 70)], "words " * 90, width=64, height=64),
]
GUIDED: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 2.5},
    {"guidance_scale": 4.0},
    {"guidance_scale": 0.5},
]


def changes(row: KleinRow, distilled: bool) -> dict[str, KleinRow]:
    """Return what each input of a row may be otherwise."""
    first, *contexts = row.images
    [other] = tiny_images(1, [first.size], seed=99)
    rows = {
        "prompt": replace(row, prompt="0"),
        "query": replace(row, images=(other, *contexts)),
        "second reference": replace(row, images=(first, other, *contexts[1:])),
        "order of references": replace(row, images=(first, *reversed(contexts))),
        "number of references": replace(row, images=row.images[:2]),
        "seed": row.but(seed=77),
        "steps": row.but(num_inference_steps=2),
    }
    return rows if distilled else rows | {"guidance": row.but(guidance_scale=1.0)}


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "base"])
def test_each_input_moves_the_reference_itself(pipes: Any, distilled: bool) -> None:
    """Else a model that ignores an input could pass."""
    row = klein_row(1, [(96, 64), (96, 64), (64, 64)], "a misty forest", num_inference_steps=4)
    image, _ = by_diffusers(pipes(distilled), row, str(row.prompt))
    still = {
        name: levels_apart(by_diffusers(pipes(distilled), changed, str(changed.prompt))[0], image)
        for name, changed in changes(row, distilled).items()
    }
    assert not {name: levels for name, levels in still.items() if levels <= LEAST_LEVELS}


def test_each_row_of_a_mixed_batch_is_what_diffusers_makes_of_it_alone(models: Any, pipes: Any) -> None:
    results = assert_rows_equal_diffusers(models(True), pipes(True), MIXED)
    shared = [result for result in results if result.paid_lane_steps < 2 * result.used_lane_steps]
    assert len(shared) > 1, "rows shared calls of the model"
    assert [result.lanes for result in results] == [1] * len(MIXED)
    assert [result.prompt_truncated for result in results] == [False] * 7 + [True]


def test_each_row_of_a_guided_mixed_batch_is_what_diffusers_makes_of_it_alone(
    models: Any, pipes: Any
) -> None:
    rows = [row.but(**GUIDED[number % len(GUIDED)]) for number, row in enumerate(MIXED)]
    results = assert_rows_equal_diffusers(models(False), pipes(False), rows)
    assert [result.lanes for result in results] == [2, 1, 2, 2, 1, 2, 1, 2]


def test_a_negative_prompt_is_what_diffusers_makes_of_its_embeddings(models: Any, pipes: Any) -> None:
    row = replace(
        klein_row(3, [(96, 64), (64, 64)], guidance_scale=5.0), negative_prompt="~ dull, grey and blurred ~"
    )
    [result] = results_of(models(False), [row])
    pipe = pipes(False)
    embeds, _ = pipe.encode_prompt(row.negative_prompt)
    output = pipe(
        image=list(row.images),
        prompt=result.full_prompt,
        negative_prompt_embeds=embeds,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    )
    assert levels_apart(result.image, np.asarray(output.images[0])) <= MOST_LEVELS
    [without] = results_of(models(False), [replace(row, negative_prompt=None)])
    assert levels_apart(result.image, without.image) > LEAST_LEVELS


def test_without_contexts_the_query_is_the_one_reference(models: Any, pipes: Any) -> None:
    row = klein_row(2, [(96, 64), (64, 64)], "a red house", context_scale=0.0, num_inference_steps=4)
    [result] = results_of(models(True), [row])
    assert result.full_prompt == "a red house"
    pixels, _ = by_diffusers(pipes(True), replace(row, images=row.images[:1]), "a red house")
    assert levels_apart(result.image, pixels) <= MOST_LEVELS


@torch.inference_mode()
def test_the_transformer_without_references_is_diffusers(models: Any, pipes: Any) -> None:
    """No row of ours is without a query: at the seam of the backbone."""
    backbone = models(True).backbone
    request = request_of(models(True), klein_row(4, [(96, 64), (64, 64)], width=64, height=80))
    height, width = 5, 4
    cos, sin = rotation(backbone.transformer, positions(LENGTH, (height, width), [], 0))
    channels = backbone.transformer.config.in_channels
    text = backbone.transformer.context_embedder(backbone.text("a boat"))
    lanes = LaneTokens(text, torch.zeros(1, 0, channels), cos[None], sin[None], None)
    table = make_table("flow_euler", 3, backbone.scheduler_config, 0, backbone.schedule(request))
    noise = torch.randn(1, channels, height, width, generator=torch.Generator("cpu").manual_seed(4))
    tokens = noise.flatten(2).transpose(1, 2)
    for timestep, coefficients in zip(table.timesteps, table.coefficients.float(), strict=True):
        output = predict_tokens(backbone.transformer, tokens, timestep[None], lanes)
        tokens = coefficients[3] * tokens + coefficients[4] * output
    _, theirs = klein_reference(pipes(True), [], "a boat", seed=4, steps=3, width=64, height=80)
    assert (tokens.transpose(1, 2).unflatten(2, (height, width)) - theirs).abs().max() <= MOST_LATENTS


@pytest.mark.parametrize(
    ("size", "steps", "sigmas"),
    [
        ((1024, 1024), 4, [1.0, 0.967, 0.908, 0.767]),
        ((64, 64), 2, [1.0, 0.877]),
        ((2048, 1104), 3, [1.0, 0.934, 0.779]),
    ],
)
def test_the_noise_levels_are_those_of_the_outputs_size(
    models: Any, pipes: Any, size: tuple[int, int], steps: int, sigmas: list[float]
) -> None:
    """Whatever the size of the references. Over 4,300 tokens the number of steps does not shift them."""
    model, pipe = models(True), pipes(True)
    row = klein_row(1, [(96, 64), (64, 64)], width=size[0], height=size[1], num_inference_steps=steps)
    schedule = model.backbone.schedule(request_of(model, row))
    table = make_table("flow_euler", steps, model.backbone.scheduler_config, 0, schedule)
    mu = compute_empirical_mu(size[0] * size[1] // 256, steps)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(table.timesteps, pipe.scheduler.timesteps, rtol=1e-6, atol=1e-4)
    assert (table.timesteps / 1000).tolist() == pytest.approx(sigmas, abs=1e-3)


@torch.inference_mode()
def test_a_large_image_is_decoded_in_tiles_without_a_state_on_the_autoencoder(models: Any) -> None:
    backbone = models(True).backbone
    latents = torch.randn(1, 16, 4, 68, generator=torch.Generator().manual_seed(0))  # 1,088 pixels wide
    whole, tiled = backbone.decode(latents), backbone.decode(latents, tiled=True)
    assert whole.shape == tiled.shape == (1, 3, 64, 1088)
    assert not torch.equal(whole, tiled)
    assert not backbone.images.vae.use_tiling
    assert torch.equal(backbone.decode(latents), whole)
