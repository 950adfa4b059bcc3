"""Train texture separation: which part of an image's tones is its style's texture, and which its layout.

Every step has new images, of layouts of many more kinds than the other stages see
(training/data/textured_layouts.py), so that a texture is learned as
such, not as whatever no known layout has. B images  S pixels
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from context_diffusion.core.records import Pixels
from context_diffusion.core.training_job import TrainJob
from context_diffusion.image_tensors import channels_first
from context_diffusion.models.native.draft import tones_of
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.layouts import Rng, Tone
from context_diffusion.training.data.pools import Ahead
from context_diffusion.training.data.styles import TEXTURES, dress, make_style
from context_diffusion.training.data.textured_layouts import varied_layout
from context_diffusion.training.look_memory import BARE
from context_diffusion.training.loop.checkpoints import (
    Metrics,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.loop.optimizer import Optimizer

FLATTENED = 0.6  # share of flat styles that stay flat
NOISY = 0.3  # share of images with a camera's noise and less contrast

# images, their structure and texture
SplitExamples = tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]


class Split(NamedTuple):
    """A batch. tones: by draft.tones_of, (B, WAYS, S, S); structure, texture: (B, S, S), in ranks of the
    image's pixels."""

    tones: Tensor
    structure: Tensor
    texture: Tensor


def train_relief(job: TrainJob, model: NativeModel, folder: Path, metrics: Metrics) -> None:
    """Train model.relief in place, resuming an earlier run."""
    steps = min(job.relief.steps, job.max_steps or job.relief.steps)
    path = folder / "relief.pt"
    workers = Workers.here()
    relief = model.relief.requires_grad_(True)
    first = 0
    size = job.relief.batch_size
    optimizer = Optimizer(nn.ModuleDict({"relief": relief}), nn.Module(), job.relief, workers)
    if (state := load_checkpoint(path)) is not None:
        load_weights(relief, state["relief"], path)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    ahead = Ahead(partial(_step_examples, job.seed, size, workers, model.image_size), job.processes)
    with closing(ahead) as examples:
        for step in range(first, steps):
            loss = split_loss(relief, split_of(examples.at(step), model.device))
            optimizer.zero_grad()
            loss.backward()
            workers.average(relief.parameters(), 0.0)
            nn.utils.clip_grad_norm_(relief.parameters(), 1.0)
            optimizer.step(min(1, (step + 1) / 50) * (1 - step / steps))
            if (step + 1) % 25 == 0:
                metrics.write(
                    stage="relief",
                    step=step + 1,
                    share=round((step + 1) / steps, 4),
                    loss=round(loss.item(), 5),
                )
            if (step + 1) % job.checkpoint_every == 0 or step + 1 == steps:
                state = {"relief": relief.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                if workers.first:
                    save_checkpoint(path, state)
    relief.eval().requires_grad_(False)


def split_loss(relief: nn.Module, split: Split) -> Tensor:
    """Return the loss of structure and texture, which are learned together since separating them is one task.

    The structure has an absolute error, since one of several possible layouts is right; the texture a squared
    error, so that uncertain textures become faint."""
    structure, texture = relief(split.tones)
    wrong = (structure - split.structure).abs().mean() + 2 * (
        slopes(structure) - slopes(split.structure)
    ).abs().mean()
    unlike = (texture - split.texture).square().mean() + (
        slopes(texture) - slopes(split.texture)
    ).square().mean()
    return wrong + 32 * unlike


def slopes(fields: Tensor) -> Tensor:
    """Return the differences (B, 2, S - 1, S - 1) of (B, S, S) to the next pixel down and to the right."""
    corner = fields[:, :-1, :-1]
    return torch.stack([fields[:, 1:, :-1] - corner, fields[:, :-1, 1:] - corner], 1)


def draw_examples(seed: int, numbers: NDArray[np.int64], side: int) -> SplitExamples:
    """Draw examples by their numbers; each depends on the seed and its number alone."""
    examples = [_example(np.random.default_rng((seed, 31, int(number))), side) for number in numbers]
    images, structure, texture = (np.stack(part) for part in zip(*examples, strict=True))
    return images, structure.astype(np.float16), texture.astype(np.float16)


def _step_examples(seed: int, size: int, workers: Workers, side: int, step: int) -> SplitExamples:
    """Draw this worker's examples of a step."""
    return draw_examples(seed, workers.share(np.arange(step * size, (step + 1) * size)), side)


def split_of(examples: SplitExamples, device: torch.device) -> Split:
    pixels, structure, texture = examples
    tones = tones_of(channels_first(pixels).to(device))
    return Split(tones, *(torch.from_numpy(part).to(device).float() for part in (structure, texture)))


def _example(rng: Rng, side: int) -> tuple[Pixels, Tone, Tone]:
    tone = varied_layout(rng, side)
    style = make_style(rng)
    if style.texture == "flat" and rng.random() > FLATTENED:
        style = replace(style, texture=str(rng.choice(TEXTURES[1:])))
    state = rng.bit_generator.state
    image = dress(tone, style, rng).astype(np.float32)
    rng.bit_generator.state = state  # the same strokes and facets
    bare = replace(style, **BARE)  # type: ignore[arg-type]
    textured, plain = (_lightness(dress(tone, look, rng)) for look in (bare, replace(bare, texture="flat")))
    if rng.random() < NOISY:
        gain = rng.uniform(0.33, 1)
        mean = image.mean()
        noise = rng.normal(0, rng.uniform(0, 12), image.shape)
        image, textured, plain = (
            mean + gain * (part - mean) for part in (image + noise / gain, textured, plain)
        )
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    structure, whole = (_ranks(pixels, lightness) for lightness in (plain, textured))
    return pixels, structure, whole - structure


def _lightness(pixels: Pixels) -> Tone:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.float32)


def _ranks(pixels: Pixels, lightness: Tone) -> Tone:
    """Return the ranks that a lightness has among an image's pixels."""
    counts = np.bincount(_lightness(pixels).astype(np.uint8).ravel(), minlength=256)
    known = np.flatnonzero(counts)
    middle = (counts.cumsum() - counts / 2) / counts.sum()
    return np.interp(lightness, known, middle[known]).astype(np.float32)
