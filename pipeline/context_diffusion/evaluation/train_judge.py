"""Trains the prompt score's judge, a tiny CLIP, on the generator's pictures and prompts: about six minutes of a core.

    python -m context_diffusion.evaluation.train_judge FOLDER [--steps 1300] [--seed 0]

A batch holds several pictures that fit one prompt, so the targets of the contrastive loss (InfoNCE, van den Oord et al.
2018; CLIP, Radford et al. 2021) are soft: spread over all pairs of the batch that fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.image_tensors import channels_first
from context_diffusion.models.native.build import build_tokenizer
from context_diffusion.training.data.layouts import Rng, make_layout
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS, THING_WORDS, describe, vocabulary
from context_diffusion.training.data.styles import dress, make_style

SIZE, PATCH, WIDTH, LAYERS, TOKENS = 128, 16, 128, 2, 20
BATCH, PICTURES, PICTURE_STEPS = 64, 2400, 150  # so many new pictures after so many steps
MEANS = {
    word: (attribute, value)
    for attribute, table in enumerate((PALETTE_WORDS, TEXTURE_WORDS, THING_WORDS))
    for value, words in enumerate(table.values())
    for word in words
}

Meanings = NDArray[np.int64]  # (N, 3) which palette, texture and thing; -1: none


def meaning(prompt: str) -> list[int]:
    """What a prompt's words name: [palette, texture, thing], -1 where it names none."""
    named = [-1, -1, -1]
    for attribute, value in (MEANS[word] for word in prompt.split() if word in MEANS):
        named[attribute] = value
    return named


def fits(shown: Meanings, named: Meanings) -> NDArray[np.bool_]:
    """Does a picture show all that a prompt names? shown: (N, 3), named: (M, 3) -> (N, M)."""
    return ((shown[:, None] == named[None]) | (named[None] < 0)).all(2)


def draw_pairs(rng: Rng, count: int) -> tuple[Tensor, list[str], Meanings]:
    """Pictures (N, 3, H, W) in [-1, 1], a prompt for each, and what each shows."""
    layouts = [make_layout(rng, SIZE) for _ in range(count // 4)]
    palettes, textures, things = list(PALETTE_WORDS), list(TEXTURE_WORDS), list(THING_WORDS)
    pictures, prompts, shown = [], [], []
    for number in range(count):
        family, tone = layouts[number % len(layouts)]
        style = make_style(rng)
        pictures.append(dress(tone, style, rng))
        prompts.append(describe(rng, style, family, ("palette", "texture")[number % 2]))
        palette = palettes.index(style.palette) if style.palette in palettes else -2
        shown.append([palette, textures.index(style.texture), things.index(family)])
    pixels = channels_first(pictures).float() / 127.5 - 1
    return pixels, prompts, np.array(shown)


def build_tokenizer_with_end() -> PreTrainedTokenizerFast:
    """The model's word tokenizer with an end token of its own, the highest id: where eos_token_id is 2, transformers'
    CLIP takes the features at the highest id instead, which would be a word in the middle."""
    tokenizer = build_tokenizer(vocabulary(), TOKENS)
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    special = [("[BOS]", tokenizer.bos_token_id), ("[END]", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [END]", special_tokens=special)
    return tokenizer


def build_judge(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIPModel with fresh weights."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "projection_dim": WIDTH}
    sizes |= {"intermediate_size": 2 * WIDTH}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=WIDTH))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped, a part of it at full size, a little noise: styles stay what they are. (B, 3, H, W) -> the same."""
    flips = torch.rand(2, generator=generator) < 0.5
    pixels = pixels.flip([axis for axis, flip in zip((2, 3), flips.tolist(), strict=True) if flip])
    side = int(SIZE * (0.6 + 0.4 * torch.rand(1, generator=generator)))
    top, left = torch.randint(0, SIZE - side + 1, (2,), generator=generator).tolist()
    pixels = F.interpolate(pixels[..., top : top + side, left : left + side], (SIZE, SIZE), mode="bilinear", antialias=False)
    noise = 0.08 * torch.rand(len(pixels), 1, 1, 1, generator=generator).square()
    return pixels + noise * torch.randn(pixels.shape, generator=generator)


def contrastive_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """Cross entropy against all pairs that fit, by rows and by columns. logits, pairs (1 or 0): (B, B)."""
    by_row, by_column = pairs / pairs.sum(1, keepdim=True).clamp(min=1), pairs / pairs.sum(0, keepdim=True).clamp(min=1)
    rows, columns = -(by_row * logits.log_softmax(1)).sum(1).mean(), -(by_column * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def train_judge(folder: Path, steps: int, seed: int = 0) -> CLIPModel:
    """Trains and leaves a folder in transformers' format, float16. Deterministic by seed and steps."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the fresh weights; all else draws from generators of its own
    generator, tokenizer = torch.Generator().manual_seed(seed), build_tokenizer_with_end()
    model = build_judge(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        if step % PICTURE_STEPS == 0:
            pixels, prompts, shown = draw_pairs(np.random.default_rng([seed, step]), PICTURES)
            words = tokenizer(prompts, padding=True, return_tensors="pt")
            pairs = torch.from_numpy(fits(shown, np.array([meaning(prompt) for prompt in prompts]))).float()
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * (1 + np.cos(np.pi * step / steps)) / 2
        rows = torch.randperm(PICTURES, generator=generator)[:BATCH]
        told = model(words["input_ids"][rows], augment(pixels[rows], generator), words["attention_mask"][rows])
        loss = contrastive_loss(told.logits_per_image, pairs[rows][:, rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=np.log(50))
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {loss:.3f}", file=sys.stderr, flush=True)
    save(model, tokenizer, folder)
    return model


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, **half)
    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(folder)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--steps", type=int, default=1300)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    train_judge(given.folder, given.steps, given.seed)
