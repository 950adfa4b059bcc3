"""Pools of training data: layouts x styles, endless and deterministic by (seed, index). numpy and OpenCV
only.

A pool is drawn once and read many times: the batch of a step depends on the step alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.training_job import TrainingJob
from context_diffusion.inputs.control_maps import control_map
from context_diffusion.training.data.layouts import Rng, Tone, make_layout
from context_diffusion.training.data.prompts import describe
from context_diffusion.training.data.styles import Style, dress, make_style, vary

Value = TypeVar("Value")


class Ahead(Generic[Value]):
    """Compute make(number) ahead, in several processes: `at(number)` returns it while the next numbers are
    computed.

    make must pickle. processes: 0 computes each number here, when it is asked for."""

    def __init__(self, make: Callable[[int], Value], processes: int) -> None:
        self._make = make
        self._processes = processes
        self._futures: dict[int, Future[Value]] = {}
        # spawn: a fork of a process that has threads, torch's among them, may hang
        self._executor = (
            ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) if processes else None
        )

    def at(self, number: int) -> Value:
        if self._executor is None:
            return self._make(number)
        wanted = range(number, number + 1 + self._processes)
        for passed in self._futures.keys() - set(wanted):
            self._futures.pop(passed).cancel()
        for ahead in wanted:
            if ahead not in self._futures:
                self._futures[ahead] = self._executor.submit(self._make, ahead)
        return self._futures.pop(number).result()

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)


CONTROL_KINDS = ("gray", "none", "canny", "soft_edges")

KIND_SHARES = (0.55, 0.25, 0.1, 0.1)

NEUTRAL_SHARE = 0.3  # of queries: the layout in grey; the others have a random style

BURNT = 0.25  # share of an image's values: a query with more of them white shows no layout

GAMMA = 2.2  # of the display: a stop more light is a factor of 2 ** (1 / GAMMA) in pixel values

VALIDATION_SEED = 2**40  # pools from here on are never trained on


@dataclass(frozen=True)
class Pool:
    """S styles, each with P images, over shared layouts; Q = 2 queries a layout, each in a style of its own.

    targets: uint8 (S·P, H, W, 3), style s has rows s·P to s·P + P. layout_of: (S·P,) its layout.
    controls: uint8 (layouts · 2, H, W, 3), control_kinds their kinds: layout l has 2l and 2l + 1.
    queries: the images that the controls were computed from.
    parents: the style that style s varies, else itself. held_out: of kinds that training never sees.
    """

    styles: list[Style]
    parents: NDArray[np.int64]
    varied: list[str]
    families: list[str]
    targets: NDArray[np.uint8]
    layout_of: NDArray[np.int64]
    queries: NDArray[np.uint8]
    controls: NDArray[np.uint8]
    control_kinds: list[str]
    held_out: bool


def _styles(rng: Rng, count: int, held_out: bool) -> tuple[list[Style], NDArray[np.int64], list[str]]:
    """Draw styles, a fifth of them variants of the one before in one attribute.

    held_out: no variants; every second style is a pair of palette and texture that training never shows
    together."""
    styles: list[Style] = []
    parents, varied = np.arange(count), [""] * count
    for s in range(count):
        if s and s % 5 == 4 and not held_out:
            varied[s], style = vary(rng, styles[s - 1])
            parents[s] = s - 1
        else:
            style = make_style(rng, held_out and s % 2 == 0)
        styles.append(style)
    return styles, parents, varied


def shift_exposure(rng: Rng, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Change a query as a camera would: exposure, contrast, noise, blur."""
    values = image.astype(np.float32) / 255
    stops = rng.uniform(-1.5, 1.5) if rng.random() < 0.5 else 0.0
    exposed = values * 2 ** (stops / GAMMA)
    values = values if (exposed > 1).mean() > BURNT else np.clip(exposed, 0, 1)
    values = values.mean() + (values - values.mean()) * rng.uniform(0.33, 1.1) + rng.normal(0, 0.05)
    if rng.random() < 0.3:
        values += rng.standard_normal(values.shape, dtype=np.float32) * rng.uniform(0, 0.05)
    if rng.random() < 0.2:
        values = np.asarray(cv2.GaussianBlur(values, (0, 0), rng.uniform(0.4, 1.0)))
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def make_query(rng: Rng, tone: Tone) -> NDArray[np.uint8]:
    """Draw a layout as a query, uint8 (S, S, 3): in grey or in any style, changed as by a camera."""
    grey = rng.random() < NEUTRAL_SHARE
    image = (
        np.repeat((tone * 255).astype(np.uint8)[..., None], 3, 2)
        if grey
        else dress(tone, make_style(rng), rng)
    )
    return shift_exposure(rng, image)


def make_pool(seed: int, styles: int, images_per_style: int, size: int = 128, held_out: bool = False) -> Pool:
    """Draw a pool, by its seed alone."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    chosen, parents, varied = _styles(rng, styles, held_out)
    layouts = [
        make_layout(rng, size, held_out)
        for _ in range(max(images_per_style * 2, styles * images_per_style // 4))
    ]
    layout_of = np.concatenate([rng.permutation(len(layouts))[:images_per_style] for _ in range(styles)])
    targets = np.stack(
        [dress(layouts[k][1], chosen[i // images_per_style], rng) for i, k in enumerate(layout_of)]
    )
    queries, controls, kinds = [], [], []
    for _, tone in layouts:
        for _ in range(2):
            query = make_query(rng, tone)
            kind = str(rng.choice(CONTROL_KINDS, p=KIND_SHARES))
            queries.append(query)
            controls.append(control_map(query, kind))
            kinds.append(kind)
    families = [family for family, _ in layouts]
    return Pool(
        chosen,
        parents,
        varied,
        families,
        targets,
        layout_of,
        np.stack(queries),
        np.stack(controls),
        kinds,
        held_out,
    )


@dataclass(frozen=True)
class Batch:
    """Indices into a pool for B samples. contexts: (B, 3) targets; counts: how many of them are shown."""

    targets: NDArray[np.int64]
    contexts: NDArray[np.int64]
    counts: NDArray[np.int64]
    controls: NDArray[np.int64]
    prompts: list[str]

    def at(self, rows: NDArray[np.int64]) -> Batch:
        """Return some rows of the batch."""
        prompts = [self.prompts[row] for row in rows]
        return Batch(self.targets[rows], self.contexts[rows], self.counts[rows], self.controls[rows], prompts)


def draw_batch(pool: Pool, rng: Rng, size: int, context_dropout: float, prompt_dropout: float) -> Batch:
    """Draw samples of a pool; contexts are other layouts in the target's style.

    If the target's style is a variant, half of the time the contexts have the original style and the prompt
    names the difference."""
    images_per_style = len(pool.targets) // len(pool.styles)
    targets = rng.integers(0, len(pool.targets), size)
    contexts, counts, prompts = np.zeros((size, 3), np.int64), np.zeros(size, np.int64), []
    for i, target in enumerate(targets):
        style = target // images_per_style
        context_style = style
        must = None
        if pool.parents[style] != style and rng.random() < 0.5:
            context_style = pool.parents[style]
            must = pool.varied[style]
        others = rng.permutation(images_per_style)
        others = others[others != target % images_per_style][:3]
        contexts[i] = context_style * images_per_style + others
        counts[i] = 0 if must is None and rng.random() < context_dropout else rng.integers(1, 4)
        prompt = describe(rng, pool.styles[style], pool.families[pool.layout_of[target]], must, pool.held_out)
        prompts.append(prompt if must or rng.random() >= prompt_dropout else "")
    controls = pool.layout_of[targets] * 2 + rng.integers(0, 2, size)
    return Batch(targets, contexts, counts, controls, prompts)


class Pools:
    """The pools of a job: `at(number)` returns a pool, held until another is asked for."""

    def __init__(self, job: TrainingJob, image_size: int) -> None:
        self.job = job
        self.image_size = image_size
        self._ahead = Ahead(
            partial(make_pool, styles=job.styles, images_per_style=job.pictures, size=image_size),
            job.processes,
        )
        self._current: tuple[int, Pool] | None = None
        self._validation: Pool | None = None

    def at(self, number: int) -> Pool:
        if self._current is None or self._current[0] != number:
            self._current = (number, self._ahead.at(self.job.seed * 1_000_003 + number))
        return self._current[1]

    def validation(self) -> Pool:
        """Return the pool of held-out styles on layouts that training never sees."""
        if self._validation is None:
            seed = VALIDATION_SEED + self.job.seed
            self._validation = make_pool(seed, 32, self.job.pictures, self.image_size, held_out=True)
        return self._validation

    def close(self) -> None:
        self._ahead.close()
