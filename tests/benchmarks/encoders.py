"""Context encoders for normalization.py --encoder, without a download: a CLIP vision model and a DINOv2 of
equal size, both trained in the same way to distinguish styles.

    python tests/benchmarks/encoders.py [--kinds clip dinov2] [--steps 600] [--folder build/encoders]

By contrast (InfoNCE, van den Oord et al. 2018): of a batch's styles, two pictures of one, each with a layout
of its own, are to be nearest to each other. Styles and layouts of training only. Prints how often that is so
among 32 held-out styles."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from context_diffusion.models.context_encoders import ENCODERS, patch_tokens
from context_diffusion.training.data.layouts import make_layout
from context_diffusion.training.data.styles import dress, make_style

SIZE, PATCH, STYLES, HELD_OUT = 128, 16, 32, 2**40
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
KINDS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=384, **SIZES)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=3, **SIZES)),
}
SHARPNESS = 10.0  # of the contrast's cosines


def pictures(seed: int, held_out: bool = False) -> Tensor:
    """uint8 (2 · STYLES, 3, SIZE, SIZE): the first of all styles, then the second."""
    rng = np.random.default_rng((HELD_OUT if held_out else 0, seed))
    styles = [make_style(rng, held_out and number % 2 == 0) for number in range(STYLES)]
    made = [dress(make_layout(rng, SIZE, held_out)[1], style, rng) for _ in range(2) for style in styles]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def embed(model: Any, images: Tensor) -> Tensor:
    """As the fusion reads its patches: their mean and deviation."""
    mean, std = (torch.tensor(part)[:, None, None] for part in ENCODERS[model.config.model_type][1:])
    tokens = patch_tokens(model, (images / 255 - mean) / std)
    return torch.cat([tokens.mean(1), tokens.std(1)], 1)


def contrast(model: Any, head: nn.Module, images: Tensor) -> Tensor:
    """-> cosines (STYLES, STYLES) of first and second pictures."""
    first, second = F.normalize(head(embed(model, images)), dim=1).chunk(2)
    return first @ second.T


def train(kind: str, steps: int) -> Any:
    torch.manual_seed(0)
    model, head = KINDS[kind](), nn.Linear(2 * SIZES["hidden_size"], 128)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 5e-4, weight_decay=0.05)
    own = torch.arange(STYLES)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 50) * (1 - step / steps)
        fits = SHARPNESS * contrast(model, head, pictures(step))
        loss = F.cross_entropy(fits, own) + F.cross_entropy(fits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = [
            (contrast(model, head, pictures(k, True)).argmax(1) == own).float().mean().item()
            for k in range(4)
        ]
    print(
        f"{kind}: of {STYLES} held-out styles the right one in {np.mean(right):.3f}, {steps} steps",
        flush=True,
    )
    return model


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--folder", type=Path, default=Path("build/encoders"))
    given = arguments.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for kind in given.kinds:
        train(kind, given.steps).save_pretrained(given.folder / kind)
