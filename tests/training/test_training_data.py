"""The data: the same by seed, held-out pairs held out, contexts of the style and never the target itself."""

from __future__ import annotations

import numpy as np

from context_diffusion.training.data.layouts import HELD_OUT_FAMILIES
from context_diffusion.training.data.pools import draw_batch, make_pool
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS, describe, vocabulary
from context_diffusion.training.data.styles import HELD_OUT, make_style


def test_a_pool_follows_from_its_seed_alone() -> None:
    first, second, other = make_pool(3, 6, 4, 64), make_pool(3, 6, 4, 64), make_pool(4, 6, 4, 64)
    assert np.array_equal(first.targets, second.targets)
    assert np.array_equal(first.controls, second.controls)
    assert first.control_kinds == second.control_kinds
    assert not np.array_equal(first.targets, other.targets)


def test_held_out_pairs_are_never_drawn_and_only_drawn_when_asked() -> None:
    rng = np.random.default_rng(0)
    assert not {(s.palette, s.texture) for s in (make_style(rng) for _ in range(500))} & HELD_OUT
    assert {(s.palette, s.texture) for s in (make_style(rng, held_out=True) for _ in range(100))} == HELD_OUT
    pool = make_pool(1, 60, 4, 64)
    assert not {(s.palette, s.texture) for s in pool.styles} & HELD_OUT
    assert not set(pool.families) & set(HELD_OUT_FAMILIES)
    assert set(make_pool(1, 40, 4, 64, held_out=True).families) >= set(HELD_OUT_FAMILIES)


def test_contexts_show_the_style_on_other_layouts_and_the_query_is_the_targets() -> None:
    pool = make_pool(2, 10, 6, 64)
    batch = draw_batch(pool, np.random.default_rng(1), 300, 0.2, 0.5)
    overrides = 0
    for target, contexts, count, control, prompt in zip(
        batch.targets, batch.contexts, batch.counts, batch.controls, batch.prompts, strict=True
    ):
        shown = contexts[:count]
        assert target not in shown
        assert control // 2 == pool.layout_of[target]
        style = target // 6
        for context in shown:
            assert pool.layout_of[context] != pool.layout_of[target] or context // 6 != style
            assert context // 6 in (style, pool.parents[style])
        if count and shown[0] // 6 != style:
            overrides += 1
            words = PALETTE_WORDS[pool.styles[style].palette] if pool.varied[style] == "palette" else []
            words = words or TEXTURE_WORDS[pool.styles[style].texture]
            assert set(prompt.split()) & set(words), "an override names what differs"
    assert overrides > 5
    assert 20 < (batch.counts == 0).sum() < 120


def test_every_word_of_a_prompt_is_known_and_there_are_sixty() -> None:
    known = set(vocabulary())
    assert len(known) >= 60
    rng = np.random.default_rng(2)
    said = " ".join(
        describe(rng, make_style(rng), f, held_out=h)
        for f in ("landscape", "maze")
        for h in (0, 1)
        for _ in range(250)
    )
    assert set(said.split()) <= known
