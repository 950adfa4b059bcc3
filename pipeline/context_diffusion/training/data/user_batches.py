"""One's own pictures as a source of batches, and batches mixed of two sources."""

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
from context_diffusion.training.data.pools import KIND_SHARES, KINDS, shift_exposure
from context_diffusion.training.data.styles import dress, make_style
from context_diffusion.training.data.user_images import Example


@dataclass(frozen=True)
class Gallery:
    """Examples of one's own pictures, as a source of batches. N pictures, E examples.

    pixels: uint8 (H, W, 3) each. latents: float16 (E, C, h, w) of the targets. summaries: of the pictures, where the
    context encoder is frozen. looks: of the pictures. encode_controls: control maps and their kinds -> float16 latents and
    layouts."""

    pixels: Sequence[Pixels]
    examples: Sequence[Example]
    kinds: Sequence[str]
    latents: Tensor
    summaries: Summaries | None
    looks: Look
    encode_controls: Callable[[Sequence[Pixels], Sequence[str]], tuple[Tensor, Layout]]

    def samples(self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]) -> Samples:
        drawn, seeds = rng.integers(0, len(self.examples), size)[rows], rng.integers(0, 2**63, size)[rows]
        contexts: list[int] = []
        counts, maps, kinds, prompts = [], [], [], []
        for number, seed in zip(drawn, seeds, strict=True):
            own = np.random.default_rng(seed)
            example = self.examples[number]
            shown = [] if own.random() < context_dropout else self.contexts(example, own)
            contexts += shown
            counts.append(len(shown))
            prompts.append(example.prompt if own.random() >= prompt_dropout else "")
            kinds.append(self.draw_kind(own))
            maps.append(control_map(self.query(example, own), kinds[-1]))  # another one each time: not worth keeping
        controls, layouts = self.encode_controls(maps, kinds)
        seen = self._seen(contexts)
        drawn_over = drafts(layouts, picked(self.looks, contexts), np.array(counts))
        return Samples(self.latents[drawn], seen, np.array(counts), controls, prompts, drawn_over)

    def _seen(self, contexts: list[int]) -> Tensor | Summaries:
        if self.summaries is not None:
            return tuple(part[contexts] for part in self.summaries)
        shown = np.stack([self.pixels[k] for k in contexts]) if contexts else np.zeros((0, *self.pixels[0].shape), np.uint8)
        return channels_first(shown).contiguous().to(self.latents.device)

    def contexts(self, example: Example, rng: Rng) -> list[int]:
        """1 to CONTEXTS of those that the example may be shown."""
        count = int(rng.integers(1, CONTEXTS + 1))
        return [int(k) for k in rng.permutation(example.contexts)[:count]]

    def draw_kind(self, rng: Rng) -> str:
        """As often as in training, among those that are asked for."""
        shares = np.array([share * (kind in self.kinds) for kind, share in zip(KINDS, KIND_SHARES, strict=True)])
        return str(rng.choice(KINDS, p=shares / shares.sum()))

    def query(self, example: Example, rng: Rng) -> Pixels:
        """The example's own query, or the target with its colours gone: grey, or its tones in another style's."""
        if example.query is not None:
            return shift_exposure(rng, self.pixels[example.query])
        grey = control_map(self.pixels[example.target], "gray")
        other = dress((grey[..., 0] / 255).astype(np.float32), make_style(rng), rng) if rng.random() < 0.5 else grey
        return shift_exposure(rng, other)


@dataclass(frozen=True)
class Mixed:
    """Batches of which `keep` come from one source, first, and the others from another."""

    kept: BatchSource
    own: BatchSource
    keep: float

    def samples(self, rng: Rng, size: int, context_dropout: float, prompt_dropout: float, rows: NDArray[np.int64]) -> Samples:
        first = round(self.keep * size)
        parts = []
        # A generator each: what one source draws must not depend on which worker's rows the other makes.
        ours, theirs = rng.spawn(2)
        for source, own, count, wanted in (
            (self.kept, ours, first, rows[rows < first]),
            (self.own, theirs, size - first, rows[rows >= first] - first),
        ):
            if len(wanted):
                parts.append(source.samples(own, count, context_dropout, prompt_dropout, wanted))
        return join(*parts)


def join(first: Samples, *others: Samples) -> Samples:
    """One after the other; the hints are the first one's."""
    for other in others:
        if isinstance(first.contexts, tuple):
            contexts: Tensor | Summaries = tuple(map(torch.cat, zip(first.contexts, other.contexts, strict=True)))
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
