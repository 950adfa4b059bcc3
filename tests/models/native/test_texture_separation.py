"""A picture's texture is told from its layout, whatever the layout; drafts wear it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from context_diffusion.models.native.draft import (
    PLAIN,
    TEXTURED,
    Layout,
    Look,
    average_textures,
    draft,
    layout_of,
    look_of,
    mirrored,
    tones_of,
)
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.texture_separation import ReliefModel
from context_diffusion.models.resolution.resolve import BUNDLED
from context_diffusion.training.data.layouts import Tone, make_layout
from context_diffusion.training.data.styles import TEXTURES, Style, dress, make_style, texture_field
from context_diffusion.training.look_memory import BARE
from support.tiny import picture, tiny_model


@pytest.fixture(scope="module")
def relief() -> ReliefModel:
    return NativeModel.from_pretrained(BUNDLED).relief


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def shown(texture: str, number: int) -> tuple[Tensor, Tone, Style]:
    """A picture of a held-out layout, its tones, its style."""
    rng = np.random.default_rng((7, number))
    style = replace(make_style(rng), texture=texture, band="all", strength=0.25, **BARE)  # type: ignore[arg-type]
    tone = make_layout(rng, 128, held_out=True)[1]
    return tones_of(tensor(dress(tone, style, np.random.default_rng(number)))), tone, style


def alike(first: Tensor, second: Tone) -> float:
    return float(np.corrcoef(first.flatten().numpy(), second.ravel())[0, 1])


@pytest.mark.parametrize(
    ("texture", "least"),
    [("stripes", 0.7), ("waves", 0.7), ("checks", 0.7), ("hatching", 0.7), ("dots", 0.6), ("brush", 0.6)],
)
def test_the_texture_is_found_and_the_layout_does_not_come_along(
    relief: ReliefModel, texture: str, least: float
) -> None:
    fields, layouts = [], []
    for number in range(8):
        tones, tone, style = shown(texture, number)
        [found] = relief.texture(tones)
        fields.append(alike(found, texture_field(style, 128, np.random.default_rng(number))))
        layouts.append(abs(alike(found, tone)))
    assert np.median(fields) > least
    assert np.median(layouts) < 0.25


def test_a_flat_picture_has_hardly_any(relief: ReliefModel) -> None:
    strengths = {
        texture: np.median([relief.texture(shown(texture, number)[0]).std().item() for number in range(8)])
        for texture in ("flat", "grain", "stripes")
    }
    assert strengths["flat"] < 0.25 * strengths["grain"]
    assert strengths["flat"] < 0.25 * strengths["stripes"]


def test_fresh_weights_say_nothing_and_any_size_will_do() -> None:
    fresh = ReliefModel((16, 16))
    tones = torch.rand(2, 2, 50, 71)
    structure, texture = fresh(tones)
    assert not fresh.learned
    assert torch.equal(structure, tones[:, 0])
    assert not texture.any()
    assert not fresh.texture(tones).any()
    plain = look_of(tensor(picture(3)), 64)
    assert all(torch.equal(a, b) for a, b in zip(tiny_model().look(tensor(picture(3))), plain, strict=True))


def test_pictures_are_treated_one_by_one(relief: ReliefModel) -> None:
    tones = torch.cat([shown(texture, 1)[0] for texture in TEXTURES[:4]])
    assert torch.allclose(
        relief.texture(tones), torch.cat([relief.texture(one[None]) for one in tones]), atol=1e-4
    )


def looks(textures: Tensor) -> Look:
    """Looks of M contexts that have these textures, (M, S, S), and nothing else."""
    plain = look_of(torch.cat([tensor(picture(9))] * len(textures)), 64)
    return Look(plain.colours[None], textures[None])


def test_a_texture_is_drawn_as_strongly_for_several_contexts() -> None:
    textures, layout = (
        0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)),
        layout_of(tensor(picture(1)), ["gray"]),
    )
    strengths = [
        average_textures(textures[None, :count], torch.full((1, count), 1 / count)).std().item()
        for count in (1, 2, 3)
    ]
    assert strengths[1] == pytest.approx(strengths[0], rel=0.05)
    assert strengths[2] == pytest.approx(strengths[0], rel=0.05)
    same = draft(layout, looks(textures[:1].repeat(3, 1, 1)), torch.ones(1, 3))
    assert torch.allclose(same, draft(layout, looks(textures[:1]), torch.ones(1, 1)), atol=1e-4)
    without, first = (
        draft(layout, looks(part), torch.ones(1, 1))[:, TEXTURED] for part in (0 * textures[:1], textures[:1])
    )
    assert (without - first).abs().mean() > 0.05
    ignored = draft(layout, looks(textures[:2]), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(ignored[:, TEXTURED], first)


def test_a_larger_picture_has_it_mirrored() -> None:
    field = torch.arange(12.0).view(1, 3, 4)
    large = mirrored(field, 7, 6)
    assert torch.equal(large[:, :3, :4], field)
    assert torch.equal(large[:, 3:6, :4], field.flip(1))
    assert torch.equal(large[:, 6, :4], field[:, 0])
    assert torch.equal(large[:, :3, 4:], field[:, :, [3, 2]])
    assert torch.equal(mirrored(field, 2, 2), field[:, :2, :2])


def test_the_querys_own_texture_is_removed_where_contexts_have_none(
    relief: ReliefModel,
) -> None:
    rng = np.random.default_rng(2)
    style = replace(make_style(rng), texture="stripes", period=10.0, band="all", strength=0.25, **BARE)  # type: ignore[arg-type]
    tone = make_layout(rng, 128)[1]
    striped = tensor(dress(tone, style, rng))
    stripes = torch.from_numpy(texture_field(style, 128, rng))
    context = look_of(
        tensor(np.linspace(0, 255, 128)[None, :, None].repeat(128, 0).repeat(3, 2).astype(np.uint8)), 128
    )
    seen = Look(*(part[None] for part in context))
    layout = layout_of(striped, ["gray"], relief.texture)
    dots = torch.from_numpy(texture_field(replace(style, texture="dots"), 128, rng))[None]
    dots -= (dots * stripes).mean() / stripes.square().mean() * stripes

    def share(of: Layout, strength: float = 0.0) -> float:
        """Return the share of the stripes that is left in the draft. strength: std, in ranks, of the dots
        that the context has."""
        texture = strength * dots[None] / dots.std()
        made = draft(of, seen._replace(texture=texture), torch.ones(1, 1))[0, TEXTURED].mean(0)
        return float((made * stripes).mean() / stripes.square().mean())

    left = share(layout_of(striped, ["gray"]))
    assert abs(share(layout)) < 0.4 * left
    assert share(layout, 0.1) > 0.8 * left
    assert share(layout) < share(layout, 1.5 * PLAIN) < share(layout, 0.1), "not all at once"
    assert not any(part.any() for part in layout_of(striped, ["canny"], relief.texture))
