"""Waves: a texture's are found where they are, whatever lies over them; a layout has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from context_diffusion.models.native.plane_waves import COUNT, draw_waves, waves_of
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import dress, make_style


def plane(period: float, angle: float, phase: float, height: int = 128, width: int = 128) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    return torch.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period + phase)


@settings(deadline=None, max_examples=30)
@given(st.floats(5, 22), st.floats(0, math.pi), st.floats(0, 6), st.floats(0.03, 0.3))
def test_a_wave_is_found_with_its_period_angle_phase_and_strength(
    period: float, angle: float, phase: float, strength: float
) -> None:
    wave = strength * plane(period, angle, phase)
    found = waves_of(0.5 + wave[None])
    assert (draw_waves(found, 128, 128)[0] - wave).abs().mean() < 0.06 * strength
    frequency = found[0, found[0, :, 2:].square().sum(1).argmax(), :2]
    assert torch.hypot(*frequency) == pytest.approx(1 / period, abs=2e-4)


def test_it_is_found_under_a_layout_and_drawn_at_any_size() -> None:
    rng = np.random.default_rng(3)
    wave = 0.15 * plane(11, 0.7, 1.0)
    for number in range(4):
        tone = torch.from_numpy(make_layout(rng, 128)[1])
        found = waves_of((tone + wave).clamp(0, 1)[None])
        strongest = found[:, found[0, :, 2:].square().sum(1).argmax()][:, None]
        drawn, wanted = draw_waves(strongest, 96, 160)[0], plane(11, 0.7, 1.0, 96, 160)
        assert torch.corrcoef(torch.stack([drawn.flatten(), wanted.flatten()]))[0, 1] > 0.9, number


@pytest.mark.parametrize("what", ["constant", "ramp", "noise"])
def test_what_does_not_repeat_has_none(what: str) -> None:
    pictures = {
        "constant": torch.full((1, 64, 64), 0.4),
        "ramp": torch.linspace(0, 1, 64).expand(1, 64, 64),
        "noise": torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)),
    }
    drawn = draw_waves(waves_of(pictures[what]), 64, 64)
    assert torch.isfinite(drawn).all()
    assert drawn.std() < 0.25 * max(float(pictures[what].std()), 0.01)


def test_pictures_are_treated_one_by_one_in_any_shape() -> None:
    pictures = torch.rand(3, 40, 33, generator=torch.Generator().manual_seed(1))
    together, alone = waves_of(pictures), torch.cat([waves_of(one[None]) for one in pictures])
    assert together.shape == (3, COUNT, 4)
    assert torch.allclose(draw_waves(together, 40, 33), draw_waves(alone, 40, 33), atol=1e-4)
    assert waves_of(torch.rand(1, 8, 8)).isfinite().all()
    assert (
        not waves_of(torch.zeros(1, 16, 48)).any(2).any()
        or not draw_waves(waves_of(torch.zeros(1, 16, 48)), 16, 48).any()
    )


def test_two_contexts_of_a_style_agree_about_its_waves() -> None:
    rng = np.random.default_rng(8)
    style = make_style(rng)
    while style.texture != "stripes" or style.band != "all":
        style = make_style(rng)
    drawn = [
        draw_waves(
            waves_of(
                torch.from_numpy(dress(make_layout(rng, 128)[1], style, rng)).float().mean(2)[None] / 255
            ),
            128,
            128,
        )
        for _ in range(2)
    ]
    assert torch.corrcoef(torch.stack([one.flatten() for one in drawn]))[0, 1] > 0.5
