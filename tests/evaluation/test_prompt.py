"""The bundled judge tells the prompt of a picture from others; any CLIP model may stand in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from context_diffusion.core.errors import ModelError
from context_diffusion.evaluation.prompt import BUNDLED, REFERENCES, PromptJudge, load_judge, prompt_score
from context_diffusion.evaluation.shuffled_controls import auc
from context_diffusion.training.data.prompts import PALETTE_WORDS, vocabulary
from support.held_out import HeldOut, held_out_rows, prompt_of


def named_rows() -> list[HeldOut]:
    """Those whose palette has a name; of the others a prompt can tell the texture only."""
    return [row for row in held_out_rows(96) if row.style.palette in PALETTE_WORDS]


def test_the_prompt_score_tells_the_prompt_of_a_picture_from_another_ones() -> None:
    """The others name another palette and another texture."""
    rows, rng = named_rows(), np.random.default_rng(5)
    true = [prompt_score(row.truth, prompt_of(rng, row.style)) for row in rows]
    false = [
        prompt_score(a.truth, prompt_of(rng, b.style))
        for step in (3, 11, 17)
        for a, b in zip(rows, rows[step:] + rows[:step], strict=True)
        if a.style.palette != b.style.palette and a.style.texture != b.style.texture
    ]
    assert len(false) > 100
    assert auc(true, false) >= 0.95
    assert np.quantile(true, 0.1) > 0.7
    assert np.mean(false) == pytest.approx(0.5, abs=0.15), "another one's prompt fits as well as any"


def test_the_word_for_the_colours_counts_in_any_place_of_the_prompt() -> None:
    """transformers takes a text's features at the highest id where the end token's id is 2: words behind it
    were lost."""
    row = next(row for row in named_rows() if row.style.palette == "ocean")
    for wording in (
        "{} colours",
        "a picture in {}",
        "wavy violin and the {}",
        "{} tones with a texture of waves",
    ):
        assert (
            prompt_score(row.truth, wording.format("ocean"))
            > prompt_score(row.truth, wording.format("ember")) + 0.2
        )


def test_the_judge_is_small_safe_and_knows_the_words_it_compares_with() -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".py", ".pt"))]
    words = {word for prompt in REFERENCES for word in prompt.split()}
    assert words <= set(vocabulary())
    assert load_judge() is load_judge()


def test_another_clip_model_from_a_folder_is_a_judge_and_what_is_none_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPModel

    judge = load_judge()
    other = CLIPModel(judge.model.config)
    for part in (other, judge.tokenizer, judge.processor):
        part.save_pretrained(tmp_path / "other")
    image = held_out_rows(96)[0].truth
    assert 0 <= prompt_score(image, "ocean", str(tmp_path / "other")) <= 1
    assert prompt_score(image, "ocean", str(tmp_path / "other")) != prompt_score(image, "ocean")
    (tmp_path / "other" / "model.safetensors").unlink()
    for wrong in (tmp_path / "other", tmp_path / "nothing"):
        with pytest.raises(ModelError, match=r"is not a CLIP model"):
            PromptJudge(str(wrong))
