"""Trains the bundled judge of the prompt score, a tiny CLIP, on synthetic images: six minutes on one core.

    python -m context_diffusion.evaluation.train_judge FOLDER [--steps 1300] [--seed 0]

A batch contains several images that match one prompt, so the targets of the contrastive loss (InfoNCE, van
den Oord et al. 2018; CLIP, Radford et al. 2021) are soft: spread over all matching pairs of the batch.
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
from context_diffusion.training.data.prompts import (
    PALETTE_WORDS,
    TEXTURE_WORDS,
    THING_WORDS,
    describe,
    vocabulary,
)
from context_diffusion.training.data.styles import dress, make_style

SIZE = 128  # pixels
PATCH = 16  # pixels
WIDTH = 128
LAYERS = 2
TOKENS = 20
BATCH = 64
POOL_IMAGES = 2400  # drawn anew every POOL_STEPS
POOL_STEPS = 150
LEARNING_RATE = 1.5e-3
MEANING_OF_WORD = {
    word: (attribute, value)
    for attribute, table in enumerate((PALETTE_WORDS, TEXTURE_WORDS, THING_WORDS))
    for value, words in enumerate(table.values())
    for word in words
}

Meanings = NDArray[np.int64]  # (N, 3): numbers of palette, texture and thing; -1: none


def meaning(prompt: str) -> list[int]:
    """Return the numbers of the palette, texture and thing that a prompt names; -1 for none."""
    numbers = [-1, -1, -1]
    for word in prompt.split():
        if word in MEANING_OF_WORD:
            attribute, value = MEANING_OF_WORD[word]
            numbers[attribute] = value
    return numbers


def matches(images: Meanings, prompts: Meanings) -> NDArray[np.bool_]:
    """Return whether each image (N, 3) shows everything that each prompt (M, 3) names: (N, M)."""
    return ((images[:, None] == prompts[None]) | (prompts[None] < 0)).all(2)


def draw_pairs(rng: Rng, count: int) -> tuple[Tensor, list[str], Meanings]:
    """Draw images (N, 3, H, W) in [-1, 1], a prompt for each, and what each image shows."""
    layouts = [make_layout(rng, SIZE) for _ in range(count // 4)]
    palettes = list(PALETTE_WORDS)
    textures = list(TEXTURE_WORDS)
    things = list(THING_WORDS)
    images = []
    prompts = []
    meanings = []
    for number in range(count):
        family, tone = layouts[number % len(layouts)]
        style = make_style(rng)
        images.append(dress(tone, style, rng))
        prompts.append(describe(rng, style, family, ("palette", "texture")[number % 2]))
        palette = palettes.index(style.palette) if style.palette in palettes else -2
        meanings.append([palette, textures.index(style.texture), things.index(family)])
    pixels = channels_first(images).float() / 127.5 - 1
    return pixels, prompts, np.array(meanings)


def build_tokenizer_with_end() -> PreTrainedTokenizerFast:
    """Return the model's word tokenizer with an end token of the highest id.

    Where eos_token_id is 2, transformers' CLIP takes the features at the highest id of a prompt; that must
    not be a word in the middle.
    """
    tokenizer = build_tokenizer(vocabulary(), TOKENS)
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    special_tokens = [("[BOS]", tokenizer.bos_token_id), ("[END]", tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single="[BOS] $A [END]", special_tokens=special_tokens)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def build_judge(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Return a CLIPModel with fresh weights."""
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
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
    """Flip images (B, 3, H, W), crop them, resize the crops to full size and add a little noise."""
    flips = torch.rand(2, generator=generator) < 0.5
    pixels = pixels.flip([axis for axis, flip in zip((2, 3), flips.tolist(), strict=True) if flip])
    side = int(SIZE * (0.6 + 0.4 * torch.rand(1, generator=generator)))
    top, left = torch.randint(0, SIZE - side + 1, (2,), generator=generator).tolist()
    crop = pixels[..., top : top + side, left : left + side]
    pixels = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=False)
    noise = 0.08 * torch.rand(len(pixels), 1, 1, 1, generator=generator).square()
    return pixels + noise * torch.randn(pixels.shape, generator=generator)


def contrastive_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """Return the cross entropy against all matching pairs, averaged over rows and columns.

    logits: (B, B); pairs: (B, B) of 1 (matching) and 0.
    """
    row_targets = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    column_targets = pairs / pairs.sum(0, keepdim=True).clamp(min=1)
    row_loss = -(row_targets * logits.log_softmax(1)).sum(1).mean()
    column_loss = -(column_targets * logits.log_softmax(0)).sum(0).mean()
    return (row_loss + column_loss) / 2


def train_judge(folder: Path, steps: int, seed: int = 0) -> CLIPModel:
    """Train a judge and save it in transformers' format, as float16.

    Deterministic for equal seed and steps.
    """
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # of the fresh weights; everything else has its own generator
    generator = torch.Generator().manual_seed(seed)
    tokenizer = build_tokenizer_with_end()
    model = build_judge(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        if step % POOL_STEPS == 0:
            pixels, prompts, image_meanings = draw_pairs(np.random.default_rng([seed, step]), POOL_IMAGES)
            words = tokenizer(prompts, padding=True, return_tensors="pt")
            prompt_meanings = np.array([meaning(prompt) for prompt in prompts])
            pairs = torch.from_numpy(matches(image_meanings, prompt_meanings)).float()
        warmup = min(1, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * (1 + np.cos(np.pi * step / steps)) / 2
        rows = torch.randperm(POOL_IMAGES, generator=generator)[:BATCH]
        outputs = model(
            words["input_ids"][rows], augment(pixels[rows], generator), words["attention_mask"][rows]
        )
        loss = contrastive_loss(outputs.logits_per_image, pairs[rows][:, rows])
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
    """Save model, tokenizer and image processor as a folder."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train_judge(options.folder, options.steps, options.seed)
