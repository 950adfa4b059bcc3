"""The model's own context encoder tells styles apart; another encoder may take its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from context_diffusion.core.errors import ModelError
from context_diffusion.evaluation.shuffled_controls import auc
from context_diffusion.evaluation.similarity import load_embedding, style_similarity
from support.held_out import held_out_rows
from support.tiny import picture


def test_similarity_tells_the_contexts_of_a_picture_from_others() -> None:
    rows = held_out_rows()
    embed = load_embedding()
    made = embed([row.truth for row in rows])
    shown = [embed(row.contexts).mean(0) for row in rows]
    scores = np.array(
        [[float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for b in shown] for a in made]
    )
    assert auc(scores.diagonal(), np.roll(scores, 5, 1).diagonal()) >= 0.95
    assert style_similarity(rows[3].truth, rows[3].contexts) == pytest.approx(
        np.clip(scores[3, 3], 0, 1), abs=1e-4
    )


def test_another_encoder_by_folder(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    image = picture(1)
    assert style_similarity(image, [image], str(tmp_path)) == pytest.approx(1, abs=1e-4)
    assert style_similarity(image, [255 - image], str(tmp_path)) < 0.999
    with pytest.raises(ModelError, match="no-such-encoder"):
        load_embedding("no-such-encoder")
