"""References of FLUX.2 [klein]: their pixels, tokens and positions are those of diffusers, and the output has
a size of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.inputs.context_images import ReferenceImage
from context_diffusion.models.flux2.prompts import LENGTH
from context_diffusion.models.flux2.references import positions
from context_diffusion.models.flux2.transformer import rotate, rotation
from context_diffusion.pipeline import ContextDiffusion
from support.klein_rows import assert_rows_equal_diffusers, klein_row, levels_apart, request_of, results_of
from support.tiny_flux2 import tiny_images

SIDES = st.integers(64, 512)


@given(SIDES, SIDES, st.integers(128**2, 300**2))
def test_a_reference_is_preprocessed_to_the_pixel_as_diffusers_does(
    width: int, height: int, max_pixels: int
) -> None:
    """max_pixels: diffusers' own number is 1024 x 1024."""
    [image] = tiny_images(1, [(width, height)], seed=width)
    ours = ReferenceImage(max_pixels).apply(np.asarray(image))
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    image = processor._resize_if_exceeds_area(processor.check_image_input(image), max_pixels)
    rows, columns = image.height // 16 * 16, image.width // 16 * 16
    theirs = processor.preprocess(image, height=rows, width=columns, resize_mode="crop")
    assert torch.equal(torch.from_numpy(ours.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1, theirs)


@torch.inference_mode()
def test_tokens_and_positions_of_references_are_diffusers(models: Any, pipes: Any) -> None:
    backbone, pipe = models(True).backbone, pipes(True)
    images = [np.asarray(image) for image in tiny_images(3, [(96, 64), (64, 128), (80, 80)])]
    values = [torch.tensor(image).permute(2, 0, 1)[None] / 255 * 2 - 1 for image in images]
    theirs, ids = pipe.prepare_image_latents(values, 1, torch.Generator(), "cpu", torch.float32)
    ours = torch.cat([backbone.images.encode(image) for image in images], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    output = torch.zeros(1, 16, 5, 7)
    text_ids = pipe._prepare_text_ids(torch.zeros(1, LENGTH, 1))
    expected = torch.cat([text_ids, pipe._prepare_latent_ids(output), ids], 1)[0]
    sizes = [(4, 6), (8, 4), (5, 5)]
    assert torch.equal(positions(LENGTH, (5, 7), sizes, 81), expected)
    assert torch.equal(positions(LENGTH, (5, 7), sizes, 96)[:-15], expected)
    assert not positions(LENGTH, (5, 7), sizes, 96)[-15:].any()


@torch.inference_mode()
def test_rotation_by_lanes_is_diffusers_for_each_lane(models: Any) -> None:
    transformer = models(True).backbone.transformer
    ids = [positions(3, (2, 2), [size], 12) for size in ((2, 3), (4, 3))]
    tokens = torch.randn(2, 19, 2, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = (
        torch.stack(parts) for parts in zip(*(rotation(transformer, lane) for lane in ids), strict=True)
    )
    ours = rotate(tokens, cos, sin)
    for lane, lane_ids in enumerate(ids):
        theirs = apply_rotary_emb(tokens[lane : lane + 1], transformer.pos_embed(lane_ids), sequence_dim=1)
        torch.testing.assert_close(ours[lane : lane + 1], theirs, rtol=1e-6, atol=1e-6)
    assert (ours[0] - ours[1]).abs().max() > 0.1


def test_references_are_scaled_down_to_the_models_number_of_pixels(
    folders: dict[bool, Path], models: Any, pipes: Any
) -> None:
    model = ContextDiffusion.from_pretrained(
        {"base": str(folders[True]), "max_reference_pixels": 128**2}, device="cpu", cpu_threads=1
    )
    row = klein_row(1, [(300, 200), (64, 250), (64, 64)], num_inference_steps=2)
    request = request_of(model, row)
    assert [image.shape[:2] for image in (request.query, *request.contexts)] == [
        (96, 144),
        (240, 64),
        (64, 64),
    ]
    [result] = results_of(model, [row])
    scaled = [Flux2ImageProcessor._resize_if_exceeds_area(image, 128**2) for image in row.images]
    [same] = assert_rows_equal_diffusers(models(True), pipes(True), [replace(row, images=tuple(scaled))])
    assert np.array_equal(result.image, same.image)
    [whole] = results_of(models(True), [row.but(width=144, height=96)])
    assert levels_apart(result.image, whole.image) > 0


@pytest.mark.parametrize(
    ("fit", "settings", "size"),
    [
        ("crop", {}, (288, 192)),
        ("pad", {}, (288, 192)),
        ("stretch", {"width": 64, "height": 80}, (64, 80)),
        ("keep", {"width": 64, "height": 80}, (64, 80)),
        ("keep", {}, (1248, 832)),
    ],
)
def test_fit_chooses_the_size_of_the_output_alone(
    models: Any, fit: Any, settings: dict[str, int], size: tuple[int, int]
) -> None:
    """`keep`: the query's aspect ratio at about the model's 1024 x 1024 pixels."""
    [query, context] = tiny_images(2, [(300, 200), (64, 64)])
    [request] = models(True).requests(query, [context], None, None, None, fit, settings)
    assert request.output_size == size
    assert request.query.shape == (192, 288, 3)
    assert models(True).backbone.latent_shape(request) == (16, size[1] // 16, size[0] // 16)
