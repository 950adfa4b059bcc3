"""Pools encoded once for the diffusion stage: latents of targets and control maps, summaries of contexts.

N images  C h w latents  H W pixels; a pool's S styles, P images each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from context_diffusion.core.records import Control, Pixels, Request
from context_diffusion.core.settings import Settings
from context_diffusion.core.training_job import SMALL
from context_diffusion.image_tensors import channels_first
from context_diffusion.inputs.decode import resize
from context_diffusion.models.native.draft import Layout, Look, draft
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.batches import (
    CONTEXTS,
    SAMPLE_SETTINGS,
    BatchSource,
    Hints,
    Samples,
    Summaries,
)
from context_diffusion.training.data.layouts import Rng
from context_diffusion.training.data.pools import Pool, Pools, draw_batch
from context_diffusion.training.data.styles import TEXTURES
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.loop.precision import mixed_precision

Seen = TypeVar("Seen", Layout, Look)


@dataclass(frozen=True)
class EncodedPool:
    """A pool with its latents and the auxiliary heads' targets: a source of batches."""

    pool: Pool
    latents: Tensor  # float16 (S·P, C, h, w)
    controls: Tensor  # float16 (layouts · 2, C, h, w)
    palettes: Tensor  # (S, 24), about unit std
    textures: Tensor  # (S,)
    as_contexts: Tensor | Summaries  # each target as a batch shows it as a context
    layouts: Layout  # float16, of the control maps
    looks: Look  # float16, of the targets

    def samples(
        self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]
    ) -> Samples:
        pool = self.pool
        batch = draw_batch(pool, rng, size, context_dropout, prompt_dropout).at(rows)
        contexts = batch.contexts[np.arange(CONTEXTS) < batch.counts[:, None]]
        styles = contexts // (len(pool.targets) // len(pool.styles))
        if isinstance(self.as_contexts, tuple):
            picked_contexts: Tensor | Summaries = tuple(part[contexts] for part in self.as_contexts)
        else:
            picked_contexts = self.as_contexts[contexts]
        return Samples(
            self.latents[batch.targets],
            picked_contexts,
            batch.counts,
            self.controls[batch.controls],
            batch.prompts,
            drafts(picked(self.layouts, batch.controls), picked(self.looks, contexts), batch.counts),
            Hints(self.palettes[styles], self.textures[styles]),
        )


def encode_pool(model: NativeModel, pool: Pool) -> EncodedPool:
    """Encode a pool; each worker encodes its share."""
    palettes = np.stack([style.lut[16::32].reshape(-1) for style in pool.styles]) * 4 - 2
    textures = torch.tensor([TEXTURES.index(style.texture) for style in pool.styles])

    def see(part: NDArray[np.int64]) -> tuple[Tensor, ...]:
        controls, layouts = encode_controls(model, pool.controls[part], [pool.control_kinds[i] for i in part])
        return controls, *layouts

    controls, *layouts = _in_parts(model, len(pool.controls), see)
    return EncodedPool(
        pool,
        encode(model, pool.targets),
        controls,
        torch.from_numpy(palettes).to(model.device),
        textures.to(model.device),
        as_images(model, pool.targets)
        if (summaries := summarise(model, pool.targets)) is None
        else summaries,
        Layout(*layouts),
        looks(model, pool.targets),
    )


def encode(model: NativeModel, pixels: Sequence[Pixels] | Pixels) -> Tensor:
    """Encode images, uint8 (H, W, 3) each, to float16 latents (N, C, h, w); each worker encodes its share."""
    return _in_parts(
        model,
        len(pixels),
        lambda part: [model.encode_pixels(as_images(model, [pixels[i] for i in part]))],
    )[0]


@torch.no_grad()
def encode_controls(
    model: NativeModel, maps: Sequence[Pixels] | Pixels, kinds: Sequence[str]
) -> tuple[Tensor, Layout]:
    """Encode control maps, uint8 (H, W, 3) each, to float16 latents (N, C, h, w) and layouts; this worker
    encodes all."""
    images = as_images(model, maps)
    with torch.autocast(model.device.type, enabled=False):
        layouts = model.layout(images, list(kinds))
    with mixed_precision(model.device):
        return model.encode_control(images, list(kinds)).half(), Layout(*(part.half() for part in layouts))


def summarise(model: NativeModel, pixels: Sequence[Pixels] | Pixels) -> Summaries | None:
    """Summarise images, uint8 (H, W, 3) each, by NativeModel.summarise_images at the encoder's own size, as
    float16.

    None: the context encoder is trained, so it needs the pixels at every step."""
    if model.context_encoder == SMALL:
        return None
    side = model.context_size

    def see(part: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return model.summarise_images(as_images(model, [resize(pixels[i], side, side, "crop") for i in part]))

    return tuple(_in_parts(model, len(pixels), see))


def looks(model: NativeModel, pixels: Sequence[Pixels] | Pixels) -> Look:
    """Measure the looks of images, uint8 (H, W, 3) each, for drafts, as float16; each worker measures its
    share."""

    def see(part: NDArray[np.int64]) -> Look:
        with torch.autocast(model.device.type, enabled=False):
            return model.look(as_images(model, [pixels[i] for i in part]))

    return Look(*_in_parts(model, len(pixels), see))


def picked(parts: Seen, rows: NDArray[np.int64] | list[int]) -> Seen:
    """Return the parts' given rows."""
    return type(parts)(*(part[rows] for part in parts))


@torch.no_grad()
def drafts(layouts: Layout, looks: Look, counts: NDArray[np.int64]) -> Tensor:
    """Return the drafts (B, CHANNELS, H, W) of B samples, each with `counts` of the looks, the first sample's
    first."""
    filled = torch.arange(CONTEXTS) < torch.from_numpy(counts)[:, None]
    slots = [part.new_zeros(*filled.shape, *part.shape[1:], dtype=torch.float32) for part in looks]
    for slot, part in zip(slots, looks, strict=True):
        slot[filled] = part.float()  # by a mask on the CPU: one on a GPU would synchronise
    return draft(layouts, Look(*slots), filled.float().to(layouts.tones.device))


def as_images(model: NativeModel, pixels: Sequence[Pixels] | Pixels) -> Tensor:
    """Turn images, uint8 (H, W, 3) each, into uint8 (N, 3, H, W) on the model's device."""
    return channels_first(pixels).contiguous().to(model.device)


@torch.no_grad()
def _in_parts(
    model: NativeModel, rows: int, see: Callable[[NDArray[np.int64]], Iterable[Tensor]]
) -> list[Tensor]:
    """Call `see` for rows 0 to `rows`, given by index, some at a time, each worker for its share; gather the
    results as float16."""
    workers = Workers.here()
    size = 32 if model.device.type == "cpu" else 256
    mine = workers.share(np.arange(rows))
    seen_rows = mine if len(mine) else np.arange(1)  # fewer rows than workers: the first row gives the shapes
    with mixed_precision(model.device):
        parts = [
            [seen.half() for seen in see(seen_rows[i : i + size])] for i in range(0, len(seen_rows), size)
        ]
    return [workers.gather(torch.cat(column)[: len(mine)], rows) for column in zip(*parts, strict=True)]


def pool_requests(
    pool: Pool, count: int, settings: Settings, prompts: bool = True
) -> tuple[list[Request], NDArray[np.int64]]:
    """Draw rows of a pool; return them and the index of each one's target."""
    batch = draw_batch(pool, np.random.default_rng(11), count, 0.0, 0.5 if prompts else 1.0)
    requests = [
        Request(
            id=f"validation-{i}",
            index=0,
            query=pool.queries[batch.controls[i]],
            controls=(Control(pool.control_kinds[batch.controls[i]], pool.controls[batch.controls[i]]),),
            contexts=tuple(pool.targets[k] for k in batch.contexts[i][: batch.counts[i]]),
            prompt=batch.prompts[i] or None,
            negative_prompt=None,
            settings=settings.model_copy(update={"seed": i}),
        )
        for i in range(count)
    ]
    return requests, batch.targets


class Generated:
    """Generated pools as training data of the loop (training/data/batches.py: Data)."""

    def __init__(self, model: NativeModel, pools: Pools, pool_steps: int) -> None:
        self.model = model
        self.pools = pools
        self.pool_steps = pool_steps
        # A frozen encoder's weights are in no checkpoint: without this, another one of the same shape would
        # go unnoticed.
        self.origin = {} if model.context_encoder == SMALL else {"context_encoder": model.context_encoder}
        self._encoded: tuple[int, EncodedPool] | None = None

    def at(self, step: int) -> EncodedPool:
        number = step // self.pool_steps
        if self._encoded is None or self._encoded[0] != number:
            self._encoded = (number, encode_pool(self.model, self.pools.at(10_000 + number)))
        return self._encoded[1]

    def validations(self) -> dict[str, BatchSource]:
        return {"validation": encode_pool(self.model, self.pools.validation())}

    def examples(self, count: int) -> tuple[list[Request], list[Pixels]]:
        pool = self.pools.validation()
        requests, targets = pool_requests(pool, count, SAMPLE_SETTINGS)
        return requests, list(pool.targets[targets])
