"""Words of prompts: colours that they name, synonyms, and words that have no effect; and the images that
follow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_diffusion import ContextDiffusion
from context_diffusion.models.native.colour_transport import lab_of
from context_diffusion.models.native.draft import STEPS, WAYS, curves_of
from context_diffusion.models.native.look_memory import named_colours, shows_colours
from context_diffusion.models.native.words import (
    COLOURS,
    FUNCTION_WORDS,
    MODIFIERS,
    SYNONYMS,
    NamedColour,
    read_words,
    vocabulary_of,
)
from context_diffusion.models.resolution.resolve import model_folder
from context_diffusion.training.data.prompts import vocabulary
from support.tiny import picture

VOCABULARY = vocabulary_of(Path(model_folder("bundled")))
KNOWN = sorted({*vocabulary(), *COLOURS, *SYNONYMS, *FUNCTION_WORDS})


@cache
def bundled() -> ContextDiffusion:
    return ContextDiffusion.from_pretrained("bundled", "cpu")


@cache
def mean_lab(prompt: str | None) -> tuple[float, float, float]:
    """The mean Lab of an image whose context is of other colours than the prompts of this file."""
    context = np.full((128, 128, 3), (40, 130, 120), np.uint8)
    context[::2] = (150, 210, 200)
    image = bundled()(picture(1, 128, 128), [context], prompt, seed=1, num_inference_steps=2)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    light, a, b = lab_of(pixels)[0].mean((1, 2)).tolist()
    return light, a, b


@pytest.mark.parametrize(
    ("prompt", "reached"),
    [
        ("yellow", lambda light, a, b: b > 40 and abs(a) < 20 and light > 60),
        ("orange and brown", lambda light, a, b: a > 15 and b > 30),
        ("blue stripes", lambda light, a, b: b < -25),
        ("red", lambda light, a, b: a > 35),
        ("black and white", lambda light, a, b: abs(a) < 6 and abs(b) < 8 and 30 < light < 70),
        ("black", lambda light, a, b: light < 22),
        ("white", lambda light, a, b: light > 75),
    ],
)
def test_an_image_has_the_colours_that_its_prompt_names(
    prompt: str, reached: Callable[[float, float, float], bool]
) -> None:
    assert not reached(*mean_lab(None))
    assert reached(*mean_lab(prompt)), mean_lab(prompt)


def test_the_seed_has_its_part_where_a_texture_is_drawn() -> None:
    images = [
        np.array(bundled()(picture(1, 128, 128), [picture(2, 128, 128)], "yellow dots", seed=seed))
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_a_call_tells_the_words_that_had_no_effect() -> None:
    image = bundled()(picture(1, 64), [picture(2, 64)], "a purple Dragon, over misty hills")
    assert image.info["unknown_words"] == ["dragon"]
    plain = bundled()(picture(1, 64), [picture(2, 64)], "purple tones")
    assert "unknown_words" not in plain.info


@pytest.mark.parametrize(
    ("prompt", "colours", "unknown"),
    [
        (None, [], []),
        ("", [], []),
        ("Yellow, and BLACK!", ["yellow", "black"], []),
        ("blue-green waves", ["blue", "green"], []),
        ("golds and greys", ["gold", "grey"], []),
        ("a castle in the castle's style", [], ["castle"]),
        ("a dark castle", [], ["dark", "castle"]),
        ("\uff42lue don't 4k", ["blue"], ["don't", "4k"]),
        ("plaid, polka dots and brushstrokes", [], []),
        ("[UNK] ink_wash", [], ["unk", "ink", "wash"]),
    ],
)
def test_words_of_a_prompt(prompt: str | None, colours: list[str], unknown: list[str]) -> None:
    words = read_words(prompt, VOCABULARY)
    assert words.colours == tuple(NamedColour(COLOURS[name]) for name in colours)
    assert list(words.unknown) == unknown


def test_a_modifier_changes_the_colour_that_follows() -> None:
    [dark, plain, light] = [read_words(f"{word} red", ()).colours[0] for word in ("very dark", "", "pale")]
    assert dark.lighter < plain.lighter == 0 < light.lighter
    assert light.chroma < plain.chroma == 1
    assert read_words("dark green", ()).unknown == ()
    lightness = [float(named_colours([colour])[0, STEPS // 2, :3].mean()) for colour in (dark, plain, light)]
    assert lightness == sorted(lightness)


@given(st.lists(st.sampled_from(KNOWN), max_size=12))
def test_words_that_are_known_are_never_unknown(words: list[str]) -> None:
    assert read_words(" ".join(words), VOCABULARY).unknown == ()
    assert read_words(", ".join(words).upper(), VOCABULARY).unknown == ()


@given(st.text(max_size=60))
def test_any_text_can_be_read(prompt: str) -> None:
    words = read_words(prompt, VOCABULARY)
    assert len(set(words.unknown)) == len(words.unknown)
    assert not set(words.unknown) & {*KNOWN}


def test_the_tables_fit_the_vocabulary() -> None:
    assert set(bundled().backbone.model.tokenizer.get_vocab()) == VOCABULARY  # type: ignore[attr-defined]
    assert set(SYNONYMS.values()) <= VOCABULARY
    other = [{*SYNONYMS}, {*COLOURS}, {*MODIFIERS}]
    assert not other[0] & (VOCABULARY | other[1] | other[2] | FUNCTION_WORDS)
    assert not (other[1] | other[2]) & FUNCTION_WORDS
    assert not other[1] & other[2]


def test_synonyms_are_read_as_the_word_of_the_vocabulary() -> None:
    assert read_words("a Tartan of ripples", VOCABULARY).text == "a checks of waves"
    assert read_words("tartan", {"tartan"}).text == "tartan"
    assert read_words("tartan", ()).unknown == ("tartan",)


@given(st.lists(st.sampled_from(sorted(COLOURS)), min_size=1, max_size=9, unique=True))
def test_a_curve_through_colours_rises_so_that_the_layout_stays(names: list[str]) -> None:
    colours = named_colours([NamedColour(COLOURS[name]) for name in names])
    assert colours.shape == (WAYS, STEPS, 4)
    assert colours.isfinite().all()
    curves = curves_of(colours[None])[0] / 2 + 0.5  # (WAYS, STEPS, 3)
    assert 0 <= curves.min() <= curves.max() <= 1
    light = lab_of(curves.permute(2, 0, 1)[None])[0, 0]
    # Colours outside sRGB are clamped, which changes their lightness a little.
    assert light.diff(dim=1).min() > -3
    assert (light[:, -1] - light[:, 0]).min() > 25


@pytest.mark.parametrize("names", [("orange", "brown"), ("blue", "white"), ("red", "green", "blue")])
def test_a_curve_contains_each_colour(names: tuple[str, ...]) -> None:
    curve = named_colours([NamedColour(COLOURS[name]) for name in names])[0, :, :3] * STEPS
    shown = lab_of(curve.T[None, :, None])[0, 1:, 0].T  # (STEPS, 2)
    for name in names:
        rgb = torch.tensor(list(bytes.fromhex(COLOURS[name])))[None, :, None, None] / 255
        wanted = lab_of(rgb)[0, 1:, 0, 0]
        assert (shown - wanted).norm(dim=1).min() < 20, name


def test_contexts_of_the_named_colours_show_them() -> None:
    yellow, gold, blue = (named_colours([NamedColour(COLOURS[name])]) for name in ("yellow", "lemon", "blue"))
    assert shows_colours(yellow, yellow)
    assert not shows_colours(yellow, blue)
    assert not shows_colours(blue, gold)


def test_the_demo_asks_for_nothing_that_the_model_does_not_know() -> None:
    path = Path(__file__).parents[3] / "jobs" / "demo_input.py"
    spec = importlib.util.spec_from_file_location("demo_input", path)
    assert spec
    assert spec.loader
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    prompts = [prompt for _, _, prompt, _ in demo.ROWS if prompt]
    assert prompts
    assert not [word for prompt in prompts for word in read_words(prompt, VOCABULARY).unknown]
