"""The draft as an image: the contexts' hues, the query's contrast, textures at the output's scale, equal
bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from context_diffusion.core.records import Pixels
from context_diffusion.models.native.colour_transport import (
    fine_chroma,
    lab_of,
    mixed_palettes,
    palette_of,
    rgb_of,
    transported,
)
from context_diffusion.models.native.draft import colours_of, tones_of
from context_diffusion.models.native.draft_image import draft_image, synthesise, texture_of
from context_diffusion.models.native.texture_separation import ReliefModel
from support.tiny import picture

HUES = [(200, 90, 80), (70, 140, 90), (80, 110, 200), (150, 120, 30)]  # of about one lightness


def tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def drawn(query: Pixels, *contexts: Pixels, weights: tuple[float, ...] = ()) -> Tensor:
    """Return the draft (3, H, W) in [0, 1], with the texture of the first context."""
    shares = list(weights or (1.0,) * len(contexts))
    images = [tensor(context) for context in contexts]
    colours = sum(
        share * colours_of(image, tones_of(image)) for share, image in zip(shares, images, strict=True)
    )
    palette = mixed_palettes([palette_of(image) for image in images], shares)
    height, width = query.shape[:2]
    texture = synthesise(texture_of(ReliefModel(), images[0], min(height, width)), height, width, 0)
    return draft_image(tensor(query), tones_of(tensor(query)), colours, palette, texture)[0]  # type: ignore[arg-type]


def patches(seed: int = 0) -> Pixels:
    """Return a context of four hues of about one lightness."""
    numbers = np.random.default_rng(seed).integers(0, 4, (16, 16))
    return np.array(HUES, np.uint8)[numbers].repeat(8, 0).repeat(8, 1)


def strokes(seed: int = 0) -> Pixels:
    """Return a context of strokes of 4 pixels in four hues of about one lightness."""
    numbers = np.random.default_rng(seed).integers(0, 4, (32, 32))
    return np.array(HUES, np.uint8)[numbers].repeat(4, 0).repeat(4, 1)


def letters(side: int = 128) -> Pixels:
    """Return black bars on white."""
    image = np.full((side, side, 3), 255, np.uint8)
    for number in range(4):
        image[side // 8 : -side // 8, side // 8 + number * side // 5 :][:, : side // 20] = 0
    return image


def test_lab_and_back() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rgb_of(lab_of(images)), images, atol=2e-3, rtol=0)


@pytest.mark.parametrize("query", [picture(3, 128, 128), letters()], ids=["coloured", "two tones"])
def test_several_hues_of_one_lightness_survive(query: Pixels) -> None:
    """A curve by tone has one colour for each tone: such a context became grey."""
    a, b = lab_of(drawn(query, patches())[None])[0, 1:].flatten(1)
    context = lab_of(tensor(patches()) / 255)[0, 1:].flatten(1)
    assert torch.hypot(a, b).mean() > 0.5 * torch.hypot(*context).mean()
    assert torch.stack([a, b]).std(1).min() > 0.4 * context.std(1).min()


def test_a_query_of_two_tones_keeps_its_contrast() -> None:
    """Nearly all of a context was black, and so was all of its image."""
    query, dark = letters(), np.full((128, 128, 3), 4, np.uint8)
    dark[::16, ::16] = 250
    lightness = lab_of(drawn(query, dark)[None])[0, 0]
    inside = torch.from_numpy(query[..., 0] == 0)
    assert lightness[~inside].median() - lightness[inside].median() > 8


def test_black_text_on_white_has_no_coloured_fringe() -> None:
    context = patches()
    lab = lab_of(drawn(letters(), context)[None])
    chroma = torch.hypot(lab[:, 1], lab[:, 2])[0]
    black = torch.from_numpy(letters()[..., 0] == 0)[None, None].float()
    beside = (torch.nn.functional.max_pool2d(black, 3, 1, 1) - black)[0, 0].bool()
    away = ~torch.nn.functional.max_pool2d(black, 13, 1, 6)[0, 0].bool()
    assert chroma[beside].mean() < 1.3 * chroma[away].mean()


def test_a_texture_is_not_mirrored_in_a_larger_image() -> None:
    noise = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
    [made] = synthesise(noise - noise.mean(), 512, 512, 0)
    assert made.shape == (512, 512)
    assert made.std() == pytest.approx(1.0, abs=0.1)
    for fold in (128, 256, 384):
        left, right = made[:, fold - 64 : fold], made[:, fold : fold + 64].flip(1)
        assert torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].abs() < 0.1


def test_the_seed_places_the_texture_and_the_same_seed_places_it_again() -> None:
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(synthesise(noise, 96, 64, 5), synthesise(noise, 96, 64, 5))
    assert not torch.allclose(synthesise(noise, 96, 64, 5), synthesise(noise, 96, 64, 6), atol=0.1)


def test_contexts_count_by_their_weights() -> None:
    red, blue = (
        np.tile(np.array(colour, np.uint8), (128, 128, 1)) for colour in ((200, 40, 40), (40, 40, 200))
    )
    shares = [
        drawn(picture(1, 128, 128), red, blue, weights=weights).mean((1, 2)) for weights in ((3, 1), (1, 3))
    ]
    assert shares[0][0] > shares[1][0] + 0.1
    assert shares[1][2] > shares[0][2] + 0.1
    queries = picture(1, 128, 128)
    assert torch.equal(
        drawn(queries, red, blue, weights=(2.0, 2.0)), drawn(queries, red, blue, weights=(1.0, 1.0))
    )


def test_transport_gives_a_query_the_contexts_colours() -> None:
    palette = palette_of(tensor(patches()))
    made = transported(lab_of(tensor(picture(4, 128, 128)) / 255), palette.colours).flatten(2)[0]
    assert (made.mean(1) - palette.colours.mean(0)).abs().max() < 4


def test_a_light_ground_takes_no_chroma_of_a_dark_colour() -> None:
    """It became lavender where a context is half navy, half cream."""
    context = np.full((128, 128, 3), (250, 240, 220), np.uint8)
    context[:, :64] = (10, 30, 90)
    query = np.full((128, 128, 3), 255, np.uint8)
    query[40:88, 40:88] = 0
    lab = lab_of(drawn(query, context)[None])
    assert lab[:, 2][lab[:, 0] > 75].min() > -10


def test_a_flat_ground_takes_strokes_of_several_hues_as_strokes() -> None:
    """It had one slow gradient of all the hues (58 from top to bottom): they were ordered by place alone."""
    lab = lab_of(drawn(letters(), strokes())[None])
    above, below = lab[:, 1:, 2:14], lab[:, 1:, -14:-2]  # of the letters
    assert (above.mean((2, 3)) - below.mean((2, 3))).norm() < 25
    assert above.std((2, 3)).min() > 0.5 * lab_of(tensor(strokes()) / 255)[:, 1:].std((2, 3)).min()


def test_fine_chroma_has_neither_large_areas_nor_what_lightness_tells() -> None:
    areas = np.array(HUES, np.uint8)[[[0, 1], [2, 3]]].repeat(64, 0).repeat(64, 1)
    rows = np.arange(128)[:, None] // 4 % 2
    by_lightness = np.where(rows[..., None], (230, 200, 120), (40, 20, 60)).repeat(128, 1).astype(np.uint8)
    chroma = {
        name: fine_chroma(lab_of(tensor(image) / 255)).square().mean().sqrt()
        for name, image in {"areas": areas, "by lightness": by_lightness, "strokes": strokes()}.items()
    }
    assert chroma["strokes"] > 15
    assert chroma["areas"] < 0.4 * chroma["strokes"]
    assert chroma["by lightness"] < 1
