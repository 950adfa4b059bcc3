"""An independent judge of textures and palettes: a small convolutional network that sees true pictures alone.

    python tests/benchmarks/bars_judge.py build/bars-judge.pt [--steps 1500]       (about five minutes of a core)

It shares nothing with the model and its scores but the generator. Pictures are blurred a little and noisy now and then,
so that it looks at textures and not at how sharp they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.model.normalization import STATISTICS, describe
from context_diffusion.schema import Pixels
from context_diffusion.training.layouts import Rng, make_layout
from context_diffusion.training.styles import PALETTES, TEXTURES, dress, make_style

PALETTE_NAMES = [*PALETTES, "random"]
BATCH, PICTURES, PICTURE_STEPS, RATE = 32, 1600, 100, 2e-3
FLOOR = 0.03  # of local contrast: below it there is no texture


class Judge(nn.Module):
    """(N, 3, H, W) in [0, 1] -> logits of the texture (N, 10), from the lightness by its local contrast, so that a faint
    texture shows as much as a strong border, and of the palette (N, 15), from the colours from dark to light."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside, kernel, stride in (
            (1, width, 5, 1),
            (width, 2 * width, 3, 2),
            (2 * width, 3 * width, 3, 2),
            (3 * width, 4 * width, 3, 1),
        ):
            layers += [nn.Conv2d(inside, outside, kernel, stride, kernel // 2), nn.GroupNorm(8, outside), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.texture = nn.Linear(8 * width, len(TEXTURES))
        self.palette = nn.Sequential(nn.Linear(STATISTICS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.palette.append(nn.Linear(128, len(PALETTE_NAMES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        lightness = images.mean(1, keepdim=True)
        mean, square = (F.avg_pool2d(part, 15, 1, 7, count_include_pad=False) for part in (lightness, lightness.square()))
        local = (lightness - mean) / ((square - mean.square()).clamp(min=0).sqrt() + FLOOR)
        features = self.features(local)
        pooled = torch.cat([features.mean((2, 3)), features.std((2, 3))], 1)
        return self.texture(pooled), self.palette(describe((images * 255).round().byte()))


def to_tensor(images: list[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def judge(network: Judge, images: list[Pixels]) -> tuple[list[str], list[str]]:
    """The names of each picture's texture and palette."""
    told = [network(to_tensor(images[i : i + 32])) for i in range(0, len(images), 32)]
    texture, palette = (torch.cat(part).argmax(1).tolist() for part in zip(*told, strict=True))
    return [TEXTURES[i] for i in texture], [PALETTE_NAMES[i] for i in palette]


def draw(rng: Rng, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Pictures and (N, 2) the numbers of texture and palette; held-out pairs among them."""
    layouts = [make_layout(rng, 128)[1] for _ in range(count // 4)]
    styles = [make_style(rng, held_out=number % 8 == 0) for number in range(count)]
    pictures = [soften(rng, dress(layouts[number % len(layouts)], style, rng)) for number, style in enumerate(styles)]
    return to_tensor(pictures), np.array([(TEXTURES.index(s.texture), PALETTE_NAMES.index(s.palette)) for s in styles])


def soften(rng: Rng, image: Pixels) -> Pixels:
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9)).astype(np.uint8)
    return np.clip(image + rng.normal(0, rng.uniform(0, 4), image.shape), 0, 255).astype(np.uint8)


def train(steps: int) -> Judge:
    torch.manual_seed(5)
    network = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        rng = np.random.default_rng((9, step))
        if step % PICTURE_STEPS == 0:
            pixels, names = draw(rng, PICTURES)
        rows = rng.integers(0, PICTURES, BATCH)
        turned = pixels[rows].flip([axis for axis in (2, 3) if rng.random() < 0.5])
        texture, palette = network(turned.to(memory_format=torch.channels_last))
        wanted = torch.from_numpy(names[rows])
        loss = F.cross_entropy(texture, wanted[:, 0]) + F.cross_entropy(palette, wanted[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return network.eval()


def load(path: Path) -> Judge:
    network = Judge()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("path", type=Path)
    arguments.add_argument("--steps", type=int, default=1500)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    network = train(given.steps)
    torch.save(network.state_dict(), given.path)
    from bars_rows import held_out_rows

    rows = held_out_rows(256, seed=77)
    textures, palettes = judge(network, [row.truth for row in rows])
    right = [t == row.style.texture for t, row in zip(textures, rows, strict=True)]
    named = [p == row.style.palette for p, row in zip(palettes, rows, strict=True) if row.style.palette != "random"]
    print(f"held-out true pictures: texture {np.mean(right):.3f}, named palettes {np.mean(named):.3f}")
