"""The models of bench_gpu.py: how each is written, its rows, its loop by diffusers and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers_loop import DiffusersLoop
from flops import Flux2Counter, costs, row_cost
from flux2_loop import Flux2Loop
from gpu_rows import CONTEXTS, KINDS, KLEIN_KINDS, REFERENCES, klein_rows, stable_diffusion_rows
from random_flux2 import KLEIN_4B, write_flux2
from random_models import write_model

from context_diffusion.core.records import Request
from context_diffusion.pipeline import ContextDiffusion

NAMES = ("flux2-klein", "sd15", "sdxl")
STEPS = {"flux2-klein": 4, "sd15": 20, "sdxl": 30}
TINY_STEPS = 2
KLEIN_SIDE, TINY_KLEIN_SIDE = 1024, 128  # of an output, in pixels


@dataclass(frozen=True)
class Case:
    """A model as it is measured.

    steps: of uniform rows. kinds: of rows, "uniform" first. batched: the kind of which diffusers runs batches
    of any size. mixed: the kind whose rows must have equal bits in another order. across: a kind of the
    engine's rows, a kind of diffusers' that is the nearest it has, and what both are. write: writes the
    weights into a folder, on a device and in a dtype, and returns the `model:` mapping. rows: makes so many
    rows of a kind, of so many steps. loop: diffusers' side, of the mapping on a device. flops: of a uniform
    row of the engine."""

    name: str
    steps: int
    kinds: tuple[str, ...]
    batched: str
    mixed: str
    across: tuple[str, str, str]
    write: Callable[[Path, torch.device, torch.dtype], dict[str, Any]]
    rows: Callable[[ContextDiffusion, str, int, int], list[Request]]
    loop: Callable[[dict[str, Any], torch.device], DiffusersLoop | Flux2Loop]
    flops: Callable[[], float]


def case_of(name: str, tiny: bool) -> Case:
    """Return the case of one of NAMES. tiny: small components."""
    steps = TINY_STEPS if tiny else STEPS[name]
    return _flux2(name, steps, tiny) if name == "flux2-klein" else _stable_diffusion(name, steps, tiny)


def _flux2(name: str, steps: int, tiny: bool) -> Case:
    side = TINY_KLEIN_SIDE if tiny else KLEIN_SIDE
    return Case(
        name,
        steps,
        KLEIN_KINDS,
        batched="shared references",
        mixed="mixed steps and references",
        across=("uniform", "shared references", "rows with references of their own to batches that share"),
        write=lambda folder, device, dtype: write_flux2(folder, None if tiny else KLEIN_4B, device, dtype),
        rows=partial(klein_rows, side=side),
        loop=Flux2Loop,
        flops=lambda: Flux2Counter().engine(REFERENCES, steps, padded=False).all,
    )


def _stable_diffusion(name: str, steps: int, tiny: bool) -> Case:
    xl = name == "sdxl"
    return Case(
        name,
        steps,
        KINDS,
        batched="uniform",
        mixed="mixed",
        across=("unguided", "uniform", "unguided rows to batches with both branches"),
        write=lambda folder, device, dtype: write_model(folder, xl, device, dtype, tiny),
        rows=stable_diffusion_rows,
        loop=DiffusersLoop,
        flops=lambda: row_cost(costs(xl), steps, lanes=2, contexts=CONTEXTS),
    )
