"""The last stage of training: which looks the model stores, and which look a prompt's words describe.

It takes seconds and needs none of the other components (models/native/look_memory.py).
N prompts, EACH of a pool's image
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.image_tensors import channels_first
from context_diffusion.models.native.draft import colours_of, tones_of
from context_diffusion.models.native.look_memory import (
    KINDS,
    RELIEF,
    Kind,
    LookMemory,
    describe_colours,
    describe_relief,
    make_network,
)
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.normalization import lightness_of
from context_diffusion.training.data.layouts import Rng
from context_diffusion.training.data.pools import Pool, make_pool
from context_diffusion.training.data.prompts import FILLERS, PALETTE_WORDS, TEXTURE_WORDS, describe
from context_diffusion.training.data.styles import Style, dress

BARE = {"outline": 0.0, "light": (0.0, 0.0), "grain": 0.0}

GREY = np.repeat(np.linspace(0, 1, 256, dtype=np.float32)[:, None], 3, 1)

PART = 64  # images measured at once


class Described(NamedTuple):
    """Looks of one kind. looks: (S, ...), as the memory stores them, with their descriptions stored: (S,
    numbers); seen: (P, numbers), descriptions of images."""

    looks: Tensor
    stored: Tensor
    seen: Tensor


def describe_pool(pool: Pool, side: int) -> dict[Kind, Described]:
    """Describe the looks of a pool, by kind. side: pixels of a stored texture."""
    parts = [channels_first(pool.targets[i : i + PART]) for i in range(0, len(pool.targets), PART)]
    swatches = torch.cat([swatch(style) for style in pool.styles])
    reliefs = torch.stack([relief(style, side) for style in pool.styles])
    colours = torch.cat([describe_colours(colours_of(part, tones_of(part))) for part in parts])
    textures = torch.cat([describe_relief(lightness_of(part.float()) / 255) for part in parts])
    return {
        "colours": Described(swatches, describe_colours(swatches), colours),
        "texture": Described(reliefs, describe_relief(reliefs[:, None] + 0.5), textures),
    }


def swatch(style: Style) -> Tensor:
    """Return a style's colours, from dark to light, as draft.Look has them: (1, WAYS, STEPS, 4)."""
    tones = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    bare = replace(style, texture="flat", **BARE)  # type: ignore[arg-type]
    image = channels_first(dress(tones, bare, np.random.default_rng(0))[None])
    return colours_of(image, tones_of(image))


def relief(style: Style, side: int) -> Tensor:
    """Return a style's texture alone, in tone: (side, side)."""
    bare = replace(style, lut=GREY, **BARE)  # type: ignore[arg-type]
    even = np.full((side, side), 0.5, np.float32)
    return torch.from_numpy(dress(even, bare, np.random.default_rng(1))[..., 0].copy()) / 255 - 0.5


def choose(styles: list[Style], rng: Rng, looks: int, textures: int) -> dict[Kind, list[int]]:
    """Choose the styles to store, by number; of textures none more often than its share, since half of all
    styles are flat."""
    order = rng.permutation(len(styles)).tolist()
    textured: list[int] = []
    left = dict.fromkeys(TEXTURE_WORDS, -(-textures // len(TEXTURE_WORDS)))
    for k in order:
        if left[styles[k].texture]:
            left[styles[k].texture] -= 1
            textured.append(k)
    return {
        "colours": [order[i % len(order)] for i in range(looks)],
        "texture": [textured[i % len(textured)] for i in range(textures)],
    }


EACH = 6

SILENT, DROPPED = 0.1, 0.15  # share of prompts that are empty; of words that are dropped

STEPS, BATCH, LEARNING_RATE = 1500, 256, 2e-3

NAMES: dict[Kind, dict[str, list[str]]] = {"colours": PALETTE_WORDS, "texture": TEXTURE_WORDS}


class Prompts(NamedTuple):
    """Prompts of images. words: NativeModel.known_words; names: (N,) bool by kind, whether they name it;
    image: (N,)."""

    words: Tensor
    names: dict[Kind, Tensor]
    image: Tensor


def remember(
    model: NativeModel, seed: int, styles: int = 640, images_per_style: int = 5, steps: int = STEPS
) -> dict[str, float]:
    """Fill model.memory; return for each kind how often its limits are right on the data they were set by."""
    memory = model.memory.cpu()
    pool = make_pool(seed, styles, images_per_style, model.image_size)
    rng = np.random.default_rng((seed, 29))
    chosen = choose(pool.styles, rng, len(memory.colours), len(memory.reliefs))
    described = describe_pool(pool, memory.reliefs.shape[1])
    memory.colours.copy_(described["colours"].looks[chosen["colours"]])
    memory.reliefs.copy_((described["texture"].looks[chosen["texture"]] * RELIEF).round())
    prompts = _prompts(model, pool, rng)
    shares: dict[str, float] = {}
    for kind, (_, stored, seen) in described.items():
        keys = _learn(
            memory, kind, prompts, stored[prompts.image // images_per_style], seen[prompts.image], steps, seed
        )
        getattr(memory, f"{kind}_keys").copy_(keys(stored[chosen[kind]]))
        shares[kind] = _set_limits(memory, kind, prompts, seen, pool, rng)
    memory.to(model.device)
    return shares


@torch.no_grad()
def _prompts(model: NativeModel, pool: Pool, rng: Rng) -> Prompts:
    words, images = [], []
    for number in rng.permutation(np.repeat(np.arange(len(pool.targets)), EACH)):
        style = pool.styles[number // (len(pool.targets) // len(pool.styles))]
        prompt = describe(rng, style, pool.families[pool.layout_of[number]]).split()
        # Words that no image depends on must have no meaning: prompts contain filler words.
        prompt = [word for word in prompt if rng.random() >= DROPPED] + rng.choice(
            FILLERS, int(rng.integers(0, 4))
        ).tolist()
        words.append("" if rng.random() < SILENT else " ".join(prompt))
        images.append(int(number))
    named = {kind: torch.tensor([_names(prompt, NAMES[kind]) for prompt in words]) for kind in KINDS}
    return Prompts(model.known_words(list(words)).cpu(), named, torch.tensor(images))


def _names(prompt: str, names: dict[str, list[str]]) -> bool:
    return bool(set(prompt.split()) & {word for all_words in names.values() for word in all_words})


def _learn(
    memory: LookMemory, kind: Kind, prompts: Prompts, stored: Tensor, seen: Tensor, steps: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """Learn words and looks by contrast: in a batch, each prompt's look must fit it better than all others,
    and vice versa.

    Returns the network that turns a stored look's description into its key."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        keys = make_network(stored.shape[1])
    learned = nn.ModuleList(
        [memory.read_kept[kind], memory.read_seen[kind], memory.see[kind], keys]
    ).requires_grad_(True)
    optimizer = torch.optim.AdamW(learned.parameters(), LEARNING_RATE, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        rows = torch.randint(len(prompts.image), (BATCH,), generator=generator)
        read_stored = memory.read_kept[kind](prompts.words[rows])
        read_seen = memory.read_seen[kind](prompts.words[rows])
        loss = _contrast(read_stored @ keys(stored[rows]).T) + _contrast(
            read_seen @ memory.see[kind](seen[rows]).T
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned.requires_grad_(False)
    return keys


def _contrast(fits: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of a matrix of fits, whose diagonal has the true pairs."""
    pairs = torch.arange(len(fits))
    return F.cross_entropy(fits, pairs) + F.cross_entropy(fits.T, pairs)


def _set_limits(
    memory: LookMemory, kind: Kind, prompts: Prompts, seen: Tensor, pool: Pool, rng: Rng
) -> float:
    """Set the limits that best separate prompts that name the kind from those that do not and, for prompts
    that do, a context in the same style from one in another. Returns the smaller of the two shares that are
    right."""
    row = KINDS.index(kind)
    images_per_style = len(pool.targets) // len(pool.styles)
    names = prompts.names[kind]
    memory.limits[row, 0], first = parted(memory.information(kind, prompts.words), names)
    named = np.array([style.palette if kind == "colours" else style.texture for style in pool.styles])
    same = prompts.image.numpy() // images_per_style
    other = rng.integers(0, len(pool.styles), len(same))
    contrary = names & torch.from_numpy(named[same] != named[other])
    alike, unlike = (
        torch.from_numpy(styles * images_per_style + rng.integers(0, images_per_style, len(same)))
        for styles in (same, other)
    )
    fits = [
        memory.fits_seen(kind, prompts.words[rows], seen[context[rows]])
        for rows, context in ((contrary, unlike), (names, alike))
    ]
    memory.limits[row, 1], second = parted(torch.cat(fits), torch.arange(sum(map(len, fits))) >= len(fits[0]))
    return min(first, second)


def parted(values: Tensor, above: Tensor) -> tuple[float, float]:
    """Return the limit that best separates the values marked `above` from the rest, and the mean of the two
    right shares.

    The limit is infinite where there is only one kind of value."""
    if not above.any() or above.all():
        return torch.inf, 1.0
    ends, places = values.double().unique(return_inverse=True)
    shares = [
        torch.bincount(places[part], minlength=len(ends)).cumsum(0) / part.sum() for part in (above, ~above)
    ]
    right = (1 - shares[0] + shares[1]) / 2
    best = int(right.argmax())
    return float(ends[best : best + 2].mean()), float(right[best])
