"""The judge's training: soft targets, the same weights by the same seed, a standard folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from context_diffusion.evaluation import train_judge
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS
from context_diffusion.training.data.styles import HELD_OUT


def test_a_picture_fits_every_prompt_that_names_nothing_else() -> None:
    named = np.array(
        [
            train_judge.meaning(p)
            for p in ("dotted sea", "dots", "turquoise hills", "", "a blue picture of hills")
        ]
    )
    ocean_dots_landscape = [list(PALETTE_WORDS).index("ocean"), list(TEXTURE_WORDS).index("dots"), 5]
    assert train_judge.matches(np.array([ocean_dots_landscape]), named).tolist() == [
        [True, True, False, True, True]
    ]


def test_the_pairs_that_fit_share_the_target() -> None:
    pairs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    least = 2 * np.log(2) / 3  # the entropy of the targets: two of three rows are shared by two
    assert train_judge.contrastive_loss(torch.where(pairs > 0, 30.0, -30.0), pairs) == pytest.approx(
        least, abs=1e-4
    )
    assert train_judge.contrastive_loss(torch.eye(3) * 60, pairs) > least + 5, "a twin is no stranger"


def test_no_held_out_pair_is_drawn_and_every_picture_fits_its_prompt() -> None:
    _, prompts, shown = train_judge.draw_pairs(np.random.default_rng(0), 200)
    palettes, textures = list(PALETTE_WORDS), list(TEXTURE_WORDS)
    assert not {(palettes[p], textures[t]) for p, t, _ in shown if p >= 0} & HELD_OUT
    assert train_judge.matches(shown, np.array([train_judge.meaning(p) for p in prompts])).diagonal().all()


def test_the_same_seed_gives_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_judge, "POOL_IMAGES", 80)
    for name in ("one", "two"):
        train_judge.train_judge(tmp_path / name, 2)
    files = [path.name for path in sorted((tmp_path / "one").iterdir())]
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
