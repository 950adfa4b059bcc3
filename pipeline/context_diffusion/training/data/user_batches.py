"""A user's images as a source of batches, and batches mixed from two sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from context_diffusion.core.records import Pixels
from context_diffusion.image_tensors import channels_first
from context_diffusion.inputs.control_maps import control_map
from context_diffusion.models.native.draft import Layout, Look
from context_diffusion.training.data.batches import CONTEXTS, BatchSource, Samples, Summaries
from context_diffusion.training.data.encoded_pools import drafts, picked
from context_diffusion.training.data.layouts import Rng
from context_diffusion.training.data.pools import CONTROL_KINDS, KIND_SHARES, shift_exposure
from context_diffusion.training.data.styles import dress, make_style
from context_diffusion.training.data.user_images import Example


@dataclass(frozen=True)
class Gallery:
    """Examples of a user's images, as a source of batches. N images, E examples.

    pixels: uint8 (H, W, 3) each. latents: float16 (E, C, h, w) of the targets. summaries: of the images;
    None: the context encoder is trained. looks: of the images. encode_controls: encodes control maps of given
    kinds to float16 latents and layouts."""

    pixels: Sequence[Pixels]
    examples: Sequence[Example]
    kinds: Sequence[str]
    latents: Tensor
    summaries: Summaries | None
    looks: Look
    encode_controls: Callable[[Sequence[Pixels], Sequence[str]], tuple[Tensor, Layout]]

    def samples(
        self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]
    ) -> Samples:
        numbers = rng.integers(0, len(self.examples), size)[rows]
        seeds = rng.integers(0, 2**63, size)[rows]
        contexts: list[int] = []
        counts, maps, kinds, prompts = [], [], [], []
        for number, seed in zip(numbers, seeds, strict=True):
            sample_rng = np.random.default_rng(seed)
            example = self.examples[number]
            sample_contexts = (
                [] if sample_rng.random() < context_dropout else self.contexts(example, sample_rng)
            )
            contexts += sample_contexts
            counts.append(len(sample_contexts))
            prompts.append(example.prompt if sample_rng.random() >= prompt_dropout else "")
            kinds.append(self.draw_kind(sample_rng))
            # a new one each time, so not cached
            maps.append(control_map(self.query(example, sample_rng), kinds[-1]))
        controls, layouts = self.encode_controls(maps, kinds)
        seen = self._seen(contexts)
        sample_drafts = drafts(layouts, picked(self.looks, contexts), np.array(counts))
        return Samples(self.latents[numbers], seen, np.array(counts), controls, prompts, sample_drafts)

    def _seen(self, contexts: list[int]) -> Tensor | Summaries:
        if self.summaries is not None:
            return tuple(part[contexts] for part in self.summaries)
        empty = np.zeros((0, *self.pixels[0].shape), np.uint8)
        images = np.stack([self.pixels[index] for index in contexts]) if contexts else empty
        return channels_first(images).contiguous().to(self.latents.device)

    def contexts(self, example: Example, rng: Rng) -> list[int]:
        """Draw 1 to CONTEXTS of the example's contexts."""
        count = int(rng.integers(1, CONTEXTS + 1))
        return [int(k) for k in rng.permutation(example.contexts)[:count]]

    def draw_kind(self, rng: Rng) -> str:
        """Draw a kind of control map among the job's, as often as in training from scratch."""
        shares = np.array(
            [share * (kind in self.kinds) for kind, share in zip(CONTROL_KINDS, KIND_SHARES, strict=True)]
        )
        return str(rng.choice(CONTROL_KINDS, p=shares / shares.sum()))

    def query(self, example: Example, rng: Rng) -> Pixels:
        """Return the example's query, or one made from the target: in grey, or its tones in a random
        style."""
        if example.query is not None:
            return shift_exposure(rng, self.pixels[example.query])
        grey = control_map(self.pixels[example.target], "gray")
        other = (
            dress((grey[..., 0] / 255).astype(np.float32), make_style(rng), rng)
            if rng.random() < 0.5
            else grey
        )
        return shift_exposure(rng, other)


@dataclass(frozen=True)
class Mixed:
    """Batches whose first share `keep` comes from generated data, and the rest from the user's."""

    generated: BatchSource
    user: BatchSource
    keep: float

    def samples(
        self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]
    ) -> Samples:
        first = round(self.keep * size)
        parts = []
        # A generator each: the draws of one source must not depend on which rows of the other this worker
        # has.
        generated_rng, user_rng = rng.spawn(2)
        for source, source_rng, count, wanted in (
            (self.generated, generated_rng, first, rows[rows < first]),
            (self.user, user_rng, size - first, rows[rows >= first] - first),
        ):
            if len(wanted):
                parts.append(source.samples(source_rng, count, context_dropout, prompt_dropout, wanted))
        return join(*parts)


def join(first: Samples, *others: Samples) -> Samples:
    """Join batches, one after the other; the hints are those of the first."""
    for other in others:
        if isinstance(first.contexts, tuple):
            contexts: Tensor | Summaries = tuple(
                map(torch.cat, zip(first.contexts, other.contexts, strict=True))
            )
        else:
            assert isinstance(other.contexts, Tensor), "both see contexts as pixels, or neither"
            contexts = torch.cat([first.contexts, other.contexts])
        first = replace(
            first,
            latents=torch.cat([first.latents, other.latents]),
            contexts=contexts,
            counts=np.concatenate([first.counts, other.counts]),
            controls=torch.cat([first.controls, other.controls]),
            prompts=[*first.prompts, *other.prompts],
            drafts=torch.cat([first.drafts, other.drafts]),
        )
    return first
