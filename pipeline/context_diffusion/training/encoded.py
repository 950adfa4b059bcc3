"""Pictures as the diffusion stage reads them, made but once: latents of targets and control maps, summaries of contexts.

N pictures  C h w latents  H W pixels; a pool's S styles, P pictures each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from context_diffusion.images import resize
from context_diffusion.model.draft import colours_of
from context_diffusion.model.native import NativeModel, draft_tones
from context_diffusion.schema import Pixels
from context_diffusion.training.batches import CONTEXTS, Hints, Samples, Summaries
from context_diffusion.training.config import SMALL
from context_diffusion.training.data import Pool, draw
from context_diffusion.training.layouts import Rng
from context_diffusion.training.precision import mixed_precision
from context_diffusion.training.styles import TEXTURES
from context_diffusion.training.workers import Workers


@dataclass(frozen=True)
class Encoded:
    """A pool with its latents and what the auxiliary heads should say of its styles: a source of batches."""

    pool: Pool
    latents: Tensor  # float16 (S·P, C, h, w)
    controls: Tensor  # float16 (layouts · 2, C, h, w)
    palettes: Tensor  # (S, 24), about unit deviation
    textures: Tensor  # (S,)
    summaries: Summaries | None  # of each target
    tones: Tensor  # float16 (layouts · 2, 2, H, W), for the draft
    colours: Tensor  # float16 (S·P, 2, steps, 4)

    def samples(self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]) -> Samples:
        pool = self.pool
        batch = draw(pool, rng, size, context_dropout, prompt_dropout).at(rows)
        contexts = batch.contexts[np.arange(CONTEXTS) < batch.counts[:, None]]
        styles = contexts // (len(pool.targets) // len(pool.styles))
        return Samples(
            self.latents[batch.targets],
            pool.targets[contexts] if self.summaries is None else tuple(part[contexts] for part in self.summaries),
            batch.counts,
            self.controls[batch.controls],
            batch.prompts,
            self.tones[batch.controls],
            self.colours[contexts],
            Hints(self.palettes[styles], self.textures[styles]),
        )


def encode_pool(model: NativeModel, pool: Pool) -> Encoded:
    palettes = np.stack([style.lut[16::32].reshape(-1) for style in pool.styles]) * 4 - 2
    textures = torch.tensor([TEXTURES.index(style.texture) for style in pool.styles])
    controls, tones = _in_parts(
        model,
        len(pool.controls),
        lambda part: encode_controls(model, pool.controls[part], [pool.control_kinds[i] for i in part]),
    )
    return Encoded(
        pool,
        encode(model, pool.targets),
        controls,
        torch.from_numpy(palettes).to(model.device),
        textures.to(model.device),
        summarise(model, pool.targets),
        tones,
        colours(model, pool.targets),
    )


def encode(model: NativeModel, pictures: Sequence[Pixels] | Pixels) -> Tensor:
    """uint8 (H, W, 3) each -> float16 latents (N, C, h, w); each worker does its share."""
    return _in_parts(model, len(pictures), lambda part: [model.encode_pixels(as_images(model, [pictures[i] for i in part]))])[0]


@torch.no_grad()
def encode_controls(model: NativeModel, maps: Sequence[Pixels] | Pixels, kinds: Sequence[str]) -> tuple[Tensor, Tensor]:
    """uint8 (H, W, 3) each -> float16 latents (N, C, h, w) and tones (N, 2, H, W) of this worker's own maps."""
    images = as_images(model, maps)
    with mixed_precision(model.device):
        return model.encode_control(images, list(kinds)).half(), draft_tones(images, list(kinds)).half()


def summarise(model: NativeModel, pictures: Sequence[Pixels] | Pixels) -> Summaries | None:
    """uint8 (H, W, 3) each -> float16, what NativeModel.summarise_images makes of them at the encoder's own size; None
    where the context encoder is trained: then it sees the pixels at every step."""
    if model.context_encoder == SMALL:
        return None
    side = model.context_size

    def see(part: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return model.summarise_images(as_images(model, [resize(pictures[i], side, side, "crop") for i in part]))

    return tuple(_in_parts(model, len(pictures), see))


def colours(model: NativeModel, pictures: Sequence[Pixels] | Pixels) -> Tensor:
    """uint8 (H, W, 3) each -> float16 (N, 2, steps, 4), for the draft; each worker does its share."""
    return _in_parts(model, len(pictures), lambda part: [colours_of(as_images(model, [pictures[i] for i in part]))])[0]


def as_images(model: NativeModel, pictures: Sequence[Pixels] | Pixels) -> Tensor:
    """uint8 (H, W, 3) each -> uint8 (N, 3, H, W), where the model is."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(pictures).transpose(0, 3, 1, 2))).to(model.device)


@torch.no_grad()
def _in_parts(model: NativeModel, rows: int, see: Callable[[NDArray[np.int64]], Iterable[Tensor]]) -> list[Tensor]:
    """What `see` makes of so many rows, given by index, as float16, 32 at a time; each worker does its share."""
    workers = Workers.here()
    mine = workers.share(np.arange(rows))
    shown = mine if len(mine) else np.arange(1)  # fewer rows than workers: the first one tells the shapes
    with mixed_precision(model.device):
        parts = [[seen.half() for seen in see(shown[i : i + 32])] for i in range(0, len(shown), 32)]
    return [workers.gather(torch.cat(column)[: len(mine)], rows) for column in zip(*parts, strict=True)]
