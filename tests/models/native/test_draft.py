"""The draft: the query's tones in the contexts' colours, whatever light either was taken in; and it leaves
with the layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.draft import (
    CHANNELS,
    Look,
    colours_of,
    draft,
    layout_of,
    look_of,
    tones_of,
)
from context_diffusion.models.native.preconditioning import REST
from context_diffusion.models.texture_features import ANGLES, PERIODS, SHARES, describe_textures
from support.tiny import picture, request, tiny_model


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def drawn(query: np.ndarray, *contexts: np.ndarray, weights: tuple[float, ...] = ()) -> Tensor:
    """(CHANNELS, H, W)"""
    look = look_of(torch.cat([tensor(one) for one in contexts]), contexts[0].shape[0])
    return draft(
        layout_of(tensor(query), ["gray"]),
        Look(*(part[None] for part in look)),
        torch.tensor([weights or (1.0,) * len(contexts)]),
    )[0]


def ramp(dark: tuple[int, int, int], light: tuple[int, int, int], side: int = 64) -> np.ndarray:
    share = np.linspace(0, 1, side)[None, :, None].repeat(side, 0)
    return (np.array(dark) * (1 - share) + np.array(light) * share).astype(np.uint8)


def test_dark_becomes_the_contexts_dark_and_light_its_light() -> None:
    context, query = ramp((40, 0, 0), (255, 200, 180)), ramp((90, 90, 90), (120, 120, 120))
    for way in drawn(query[:, ::-1], context)[:9].split(3):
        made = (way.permute(1, 2, 0).numpy() + 1) / 2 * 255
        assert np.abs(made - context[:, ::-1]).mean() < 6


@pytest.mark.parametrize("change", [lambda x: x / 2, lambda x: x * 0.35 + 150, lambda x: x + 20])
def test_the_querys_exposure_and_contrast_are_removed(change: object) -> None:
    query = ramp((10, 10, 10), (220, 220, 220))
    other = change(query.astype(float)).astype(np.uint8)  # type: ignore[operator]
    first, second = (drawn(one, picture(3)) for one in (query, other))
    assert (first - second).abs().mean() < 0.05


def test_rows_are_treated_one_by_one_and_without_contexts_there_is_nothing() -> None:
    queries = torch.cat([tensor(picture(n)) for n in range(3)])
    looks = look_of(torch.cat([tensor(picture(n)) for n in (9, 8, 7)]), 64)
    made = draft(
        layout_of(queries, ["gray"] * len(queries)),
        Look(*(part[:, None] for part in looks)),
        torch.tensor([[1.0], [1.0], [0.0]]),
    )
    assert made.shape == (3, CHANNELS, 64, 64)
    assert torch.allclose(made[0], drawn(picture(0), picture(9)), atol=1e-5)
    assert made[1].any()
    assert not made[2].any()
    assert made[:, :9].abs().max() <= 1


def test_a_context_of_weight_zero_is_none_and_weights_are_relative() -> None:
    queries, (a, b) = picture(0), (picture(1), picture(2))
    assert torch.equal(drawn(queries, a, b, weights=(1.0, 0.0)), drawn(queries, a))
    assert torch.allclose(drawn(queries, a, b, weights=(2.0, 2.0)), drawn(queries, a, b), atol=1e-5)
    assert not torch.allclose(drawn(queries, a, b, weights=(2.0, 1.0)), drawn(queries, a, b), atol=1e-3)


def test_edge_maps_have_no_tones() -> None:
    layout = layout_of(tensor(picture(1)).repeat(2, 1, 1, 1), ["gray", "canny"])
    assert layout.tones.flatten(1).any(1).tolist() == [True, False]
    assert not layout.texture[1].any()
    looks = Look(*(part[None].expand(2, *([-1] * part.ndim)) for part in look_of(tensor(picture(2)), 64)))
    assert draft(layout, looks, torch.ones(2, 1)).flatten(1).any(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, [False, True]),
        ({"control": "canny"}, [False, False]),
        ({"context_scale": 0.0}, [False, False]),
        ({"context_weights": [0.0]}, [False, False]),
    ],
)
def test_only_the_lane_that_sees_the_contexts_sees_the_draft(
    changes: dict[str, object], drawn: list[bool]
) -> None:
    one = request(1, **({"context_guidance_scale": 2.0} | changes))
    backbone = NativeBackbone(tiny_model())
    encoded = backbone.encode(one, backbone.branches(one), Cache(2**20))
    assert [bool(lane["draft"].any()) for lane in encoded.lanes] == drawn


def test_the_draft_leaves_with_the_layout() -> None:
    """A ControlNet of scale 0 is no ControlNet, and no draft either: the query's pixels change nothing."""
    backbone, generator = NativeBackbone(tiny_model()), torch.Generator().manual_seed(0)
    outputs = []
    for seed in (1, 2):
        one = request(5, controlnet_conditioning_scale=0.0)
        [control] = one.controls
        one = dataclasses.replace(one, controls=(dataclasses.replace(control, pixels=picture(seed)),))
        encoded = backbone.encode(one, backbone.branches(one), Cache(2**20))
        assert encoded.control
        latents = torch.randn(1, *backbone.model.latent_shape, generator=generator.manual_seed(0))
        output = backbone.predict(
            latents, torch.tensor([500.0]), encoded.lanes[-1], encoded.control, backbone.shape_group(one)
        )
        outputs.append(output)
    assert torch.equal(*outputs)


def test_stripes_are_told_from_their_turned_copy_by_angle_and_from_coarser_ones_by_period() -> None:
    x = torch.arange(128, dtype=torch.float32)

    def strongest(wave: Tensor) -> tuple[int, int]:
        energies = describe_textures(0.5 + 0.2 * wave[None, None])[0, :-2].view(
            len(PERIODS), ANGLES, len(SHARES)
        )
        place = int(energies[:, :, 1].argmax())
        return divmod(place, ANGLES)

    fine, coarse = (torch.sin(2 * torch.pi * x / (2 * period)).expand(128, 128) for period in (4.5, 11.0))
    assert strongest(fine) == (1, 0)
    assert strongest(fine.T) == (1, ANGLES // 2)
    assert strongest(coarse) == (3, 0)


@pytest.mark.parametrize("timestep", [0.0, 7.0, 500.0, 500.5, 999.0])
def test_what_the_draft_lacks_is_denoised_from_the_best_guess_without_learning(timestep: float) -> None:
    model = tiny_model()
    alphas = DDIMScheduler.from_config(model.scheduler_config).alphas_cumprod
    low, high = int(np.floor(timestep)), int(np.ceil(timestep))
    a = ((alphas[low] + alphas[high]) / 2) ** 0.5
    s = (1 - a * a) ** 0.5
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(2, *model.latent_shape, generator=generator) for _ in range(2))
    drafts = torch.zeros(2, CHANNELS, model.image_size, model.image_size)
    drafts[0] = drawn(picture(0), picture(1))
    found = model.encode_draft(drafts)
    assert found.latents[0].abs().mean() > 0.01
    assert not found.latents[1].any(), "a row without a draft has none in its latents"
    x = a * z + s * noise
    given, gain, known = model.precondition(x, torch.full((2,), timestep), found)
    rest, channels = z - found.latents, z.shape[1]
    variance = torch.tensor([REST, 1.0])[:, None, None, None]
    total = a * a * variance + s * s
    torch.testing.assert_close(
        given[:, :channels], (a * rest + s * noise) / total.sqrt(), atol=1e-5, rtol=1e-5
    )
    # With nothing learned: the guess of a picture is the draft and a share of what differs from it; all of x
    # without one.
    guess = a * x - s * known
    torch.testing.assert_close(
        guess, found.latents + a * variance / total * (a * rest + s * noise), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(gain.expand(2, 1, 1, 1), (variance / total).sqrt(), atol=1e-5, rtol=1e-5)
    assert not known[1].abs().max() > 1e-5, "without a draft the U-Net's output is v"


def test_what_a_picture_shows_is_summed_exactly_in_any_order() -> None:
    """A GPU adds in another order each time: 93 of 96 rows had other bits the second time, seen on an
    H200."""
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (2, 3, 128, 128), dtype=np.uint8))
    shuffled = images.flatten(2)[
        ..., torch.randperm(128 * 128, generator=torch.Generator().manual_seed(1))
    ].unflatten(2, (128, 128))
    assert torch.equal(colours_of(images, tones_of(images)), colours_of(shuffled, tones_of(shuffled)))
