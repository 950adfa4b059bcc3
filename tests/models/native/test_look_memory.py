"""What prompts say, read as looks: of the bundled memory, of drafts with it, of a memory that is made
anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion.core.records import Request
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.conditioning import weighted_contexts
from context_diffusion.models.native.lane_drafts import NativeDrafts
from context_diffusion.models.native.look_memory import KINDS, LookMemory, describe_colours, describe_relief
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS
from context_diffusion.training.data.styles import PALETTES, TEXTURES, Style, dress, make_lut, make_style
from context_diffusion.training.look_memory import parted, relief, remember, swatch
from support.tiny import SIZES, make_tiny, request

BOTH = Branch(1.0, contexts=True, prompt=True)


@cache
def bundled() -> NativeModel:
    return NativeModel.from_pretrained(model_folder("bundled"))


def styles(key: str, value: str, count: int) -> list[Style]:
    """Styles that training drew none of, with this palette or texture."""
    rng, found = np.random.default_rng((91, count)), list[Style]()
    for _ in range(count):
        style = replace(make_style(rng), **{key: value})  # type: ignore[arg-type]
        found.append(replace(style, lut=make_lut(rng, value)) if key == "palette" else style)
    return found


@cache
def drawn_colours() -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([describe_colours(swatch(one)) for one in styles("palette", name, 60)])
        for name in PALETTES
    }


@cache
def drawn_textures() -> dict[str, torch.Tensor]:
    reliefs = {
        name: torch.stack([relief(one, 128) for one in styles("texture", name, 40)])[:, None]
        for name in TEXTURES
    }
    return {name: describe_relief(found + 0.5) for name, found in reliefs.items()}


def nearest(drawn: dict[str, torch.Tensor], found: torch.Tensor) -> str:
    """The name of the description that is most like this one."""
    return min(drawn, key=lambda name: float((drawn[name] - found).square().sum(1).min()))


@pytest.mark.parametrize("palette", PALETTES)
def test_colours_recalled_for_a_palettes_words_are_that_palettes(palette: str) -> None:
    model, drawn, right = bundled(), drawn_colours(), []
    for word in PALETTE_WORDS[palette]:
        words = model.known_words([f"dotted texture in {word}"])  # a wording that training has not
        assert model.memory.says("colours", words), word
        for seed in range(4):
            number = model.memory.recall("colours", words, seed)
            found = describe_colours(model.memory.colours[number : number + 1])[0]
            right.append(nearest(drawn, found) == palette)
    assert np.mean(right) > 0.5  # ember and autumn are alike; by chance .07


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_recalled_for_its_words_is_that_texture(texture: str) -> None:
    model, drawn, right = bundled(), drawn_textures(), []
    for word in TEXTURE_WORDS[texture]:
        words = model.known_words([f"{word} texture in rose"])
        assert model.memory.says("texture", words), word
        for seed in range(16):
            number = model.memory.recall("texture", words, seed)
            kept = model.memory.reliefs[number].float()[None, None] / 256
            found = describe_relief(kept + 0.5)
            right.append(nearest(drawn, found) == texture)
    assert np.mean(right) >= 0.75


@pytest.mark.parametrize(
    "prompt", ["", "hills", "a picture of clouds", "qwerty zxcvb", "the view with patches in a scene"]
)
def test_words_that_name_neither_tell_nothing(prompt: str) -> None:
    words = bundled().known_words([prompt])
    assert not any(bundled().memory.says(kind, words) for kind in KINDS)


def drafts(one: Request, branch: Branch = BOTH) -> torch.Tensor:
    """The picture that a lane begins from, (3, H, W); what the detail is given back of is the same one."""
    found, kept = NativeDrafts(bundled()).of(one, branch, weighted_contexts(one, 8), Cache(10**9))
    pixels = torch.nn.functional.pixel_shuffle(found["draft"], 4)[0, 6:9]
    if kept:
        assert kept["drafts"].shape[-2:] == pixels.shape[-2:]
    return pixels


@pytest.fixture(scope="module")
def row() -> Callable[..., Request]:
    """A row whose context is an ocean with dots."""
    rng = np.random.default_rng(3)
    style = replace(
        make_style(rng),
        palette="ocean",
        texture="dots",
        lut=make_lut(rng, "ocean"),
        strength=0.28,
        period=12.0,
    )
    style = replace(style, band="all", outline=0.0, light=(0.0, 0.0))
    (_, tone), (_, other) = make_layout(rng, 128), make_layout(rng, 128)
    query = np.repeat((tone * 255).astype(np.uint8)[..., None], 3, 2)
    context = dress(other, style, rng)

    def make(prompt: str | None = None, contexts: int = 1, kind: str = "gray", **settings: object) -> Request:
        made = request(0, contexts=0, prompt=prompt, **settings)
        return replace(made, query=query, controls=controls_of(query, [kind]), contexts=(context,) * contexts)

    return make


def test_a_prompt_that_contradicts_the_contexts_changes_what_it_names_and_no_more(
    row: Callable[..., Request],
) -> None:
    plain = drafts(row())
    assert torch.equal(drafts(row("ocean tones")), plain)
    assert torch.equal(drafts(row("dotted hills")), plain)
    assert torch.equal(drafts(row("hills")), plain)
    red, striped = drafts(row("ember tones")), drafts(row("striped texture"))
    assert red.mean((1, 2)).argmax() == 0
    assert plain.mean((1, 2)).argmax() == 2
    assert (striped.mean((1, 2)) - plain.mean((1, 2))).abs().max() < 0.1 < (striped - plain).abs().mean()


def test_contexts_that_are_guided_by_more_stand(row: Callable[..., Request]) -> None:
    more = {"guidance_scale": 1.0, "context_guidance_scale": 2.0}
    assert torch.equal(drafts(row("ember tones", **more)), drafts(row()))
    assert not torch.equal(
        drafts(row("ember tones", guidance_scale=2.0, context_guidance_scale=2.0)), drafts(row())
    )


def test_a_prompt_alone_has_a_draft_where_it_tells_of_a_look(row: Callable[..., Request]) -> None:
    red = drafts(row("ember tones", contexts=0))
    assert red.mean((1, 2)).argmax() == 0
    assert torch.equal(drafts(row("ember tones", context_scale=0.0)), red)
    others = []
    for seed in range(1, 9):
        one = row("ember tones", contexts=0)
        others.append(drafts(replace(one, settings=one.settings.model_copy(update={"seed": seed}))))
    assert any(not torch.equal(one, red) for one in others)
    for silent in (row(contexts=0), row("hills", contexts=0), row("ember tones", contexts=0, kind="canny")):
        assert not drafts(silent).any()


def test_lanes_with_contexts_have_one_draft(row: Callable[..., Request]) -> None:
    given = replace(
        row("ember tones", guidance_scale=3.0, context_guidance_scale=2.0), negative_prompt="ocean tones"
    )
    assert torch.equal(drafts(given, Branch(-1.0, contexts=True, prompt=False)), drafts(given))


def test_the_negative_prompt_is_read_for_the_lane_without_contexts(row: Callable[..., Request]) -> None:
    given = replace(row("ocean tones", contexts=0), negative_prompt="ember tones")
    assert torch.equal(
        drafts(given, Branch(-0.5, contexts=False, prompt=False)), drafts(row("ember tones", contexts=0))
    )


def test_a_memory_is_made_the_same_twice_and_kept(tmp_path: Path) -> None:
    made = []
    for folder in ("first", "second"):
        torch.manual_seed(0)
        model = make_tiny(SIZES)
        found = remember(model, seed=5, styles=24, images_per_style=4, steps=20)
        assert set(found) == set(KINDS)
        assert all(0.4 <= share <= 1 for share in found.values())
        model.save_pretrained(tmp_path / folder, torch.float32)
        made.append(NativeModel.from_pretrained(tmp_path / folder).memory)
    first, second = (one.state_dict() for one in made)
    assert first["colours"].any()
    assert first["reliefs"].any()
    assert first["reliefs"].dtype is torch.int8
    assert torch.isfinite(first["limits"]).all()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_memory_that_has_learned_nothing_says_nothing() -> None:
    memory = LookMemory(8, looks=4, textures=4, side=16)
    assert not any(memory.says(kind, torch.ones(1, 8)) for kind in KINDS)


def test_a_relief_is_mirrored_where_a_picture_is_larger() -> None:
    memory = LookMemory(8, looks=4, textures=2, side=16)
    memory.reliefs.copy_(torch.randint(-90, 90, (2, 16, 16)))
    [large] = memory.relief(1, 40, 24)
    assert large.shape == (40, 24)
    assert torch.equal(large[:16, :16], memory.relief(1, 16, 16)[0])
    assert torch.equal(large[16:32], large[:16].flip(0))
    assert torch.equal(large[:, 16:24], large[:, 8:16].flip(1))


@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans()), min_size=4, max_size=30))
def test_a_limit_parts_as_well_as_any(found: list[tuple[int, bool]]) -> None:
    values, above = (
        torch.tensor([float(value) for value, _ in found]),
        torch.tensor([label for _, label in found]),
    )
    if not above.any() or above.all():
        return

    def right(limit: float) -> float:
        return float(
            ((values[above] > limit).double().mean() + (values[~above] <= limit).double().mean()) / 2
        )

    limit, told = parted(values, above)
    assert told == pytest.approx(right(limit))
    assert told == pytest.approx(max(right(value + 0.5) for value in range(-10, 10)))
