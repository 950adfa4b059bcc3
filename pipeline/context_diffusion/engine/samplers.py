"""A scheduler as a table: every step of every sampler is the same fused update with other coefficients.

    model input   scale_in · x   at `timestep`
    x0          = p · x + q · out
    x'          = a · x + b · x0 + c · x0_prev + d · noise

The timesteps and sigmas are diffusers' own; the coefficients are computed here in float64 and proved against its
`step` (tests/engine/test_samplers.py). DDIM: Song et al. 2021, eq. 12 with eta 0. Euler: Karras et al. 2022, alg. 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from numpy.typing import NDArray

from context_diffusion.errors import ModelError

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """The coefficients of S steps.

    timesteps: (S,) what the model is told. coefficients: (S, 7) columns scale_in, p, q, a, b, c, d.
    init_scale: what pure noise is multiplied with at the start.
    noised: (S, 2) factors of image and noise where step s starts from an image (image to image).
    """

    timesteps: torch.Tensor
    coefficients: torch.Tensor
    init_scale: float
    noised: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def make_table(scheduler: str, num_inference_steps: int, config: Mapping[str, Any]) -> Table:
    """The table of a sampler (a key of SAMPLERS) over so many steps; config: a diffusers scheduler_config."""
    return _cached(scheduler, num_inference_steps, json.dumps(dict(config), sort_keys=True, default=str))


@lru_cache(maxsize=256)
def _cached(scheduler: str, steps: int, config_text: str) -> Table:
    config = json.loads(config_text)
    if config.get("clip_sample") or config.get("thresholding"):
        raise ModelError("scheduler_config: clip_sample and thresholding are not linear; set both to false")
    return SAMPLERS[scheduler](steps, config)


def _ddim(steps: int, config: dict[str, Any]) -> Table:
    reference = DDIMScheduler.from_config(config)
    reference.set_timesteps(steps)
    timesteps = reference.timesteps.numpy().astype(np.int64)
    alphas = reference.alphas_cumprod.double().numpy()
    previous = timesteps - reference.config.num_train_timesteps // steps
    # Past the last step diffusers takes final_alpha_cumprod: 1, or the first alpha, by `set_alpha_to_one`.
    after = np.where(previous >= 0, alphas[np.maximum(previous, 0)], float(reference.final_alpha_cumprod))
    signal, sigma = np.sqrt(alphas[timesteps]), np.sqrt(1 - alphas[timesteps])
    p, q = _x0_variance_preserving(signal, sigma, config.get("prediction_type", "epsilon"))
    a = np.sqrt(1 - after) / sigma
    b = np.sqrt(after) - a * signal
    return _table(timesteps, np.ones(steps), p, q, a, b, 1.0, np.stack([signal, sigma], 1))


def _euler(steps: int, config: dict[str, Any]) -> Table:
    reference = EulerDiscreteScheduler.from_config(config)
    reference.set_timesteps(steps)
    sigmas = reference.sigmas.double().numpy()
    sigma, after = sigmas[:-1], sigmas[1:]
    p, q = _x0_variance_exploding(sigma, config.get("prediction_type", "epsilon"))
    a = after / sigma
    return _table(
        reference.timesteps.double().numpy(),
        1 / np.sqrt(sigma**2 + 1),
        p,
        q,
        a,
        1 - a,
        float(reference.init_noise_sigma),
        np.stack([np.ones(steps), sigma], 1),
    )


SAMPLERS: dict[str, Callable[[int, dict[str, Any]], Table]] = {"ddim": _ddim, "euler": _euler}


def _x0_variance_preserving(signal: Vector, sigma: Vector, prediction: str) -> tuple[Vector, Vector]:
    """x = signal · x0 + sigma · noise, signal² + sigma² = 1: the factors of x and of the model's output in x0."""
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal
    if prediction == "v_prediction":
        return signal, -sigma
    if prediction == "sample":
        return np.zeros_like(signal), np.ones_like(signal)
    raise ModelError(f"scheduler_config: prediction_type {prediction!r} is not epsilon, v_prediction or sample")


def _x0_variance_exploding(sigma: Vector, prediction: str) -> tuple[Vector, Vector]:
    """x = x0 + sigma · noise: the factors of x and of the model's output in x0."""
    if prediction == "epsilon":
        return np.ones_like(sigma), -sigma
    if prediction == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
    if prediction == "sample":
        return np.zeros_like(sigma), np.ones_like(sigma)
    raise ModelError(f"scheduler_config: prediction_type {prediction!r} is not epsilon, v_prediction or sample")


def _table(
    timesteps: Vector | NDArray[np.int64],
    scale_in: Vector,
    p: Vector,
    q: Vector,
    a: Vector,
    b: Vector,
    init_scale: float,
    noised: Vector,
) -> Table:
    zero = np.zeros_like(p)
    coefficients = np.stack([scale_in, p, q, a, b, zero, zero], axis=1)
    return Table(
        torch.tensor(np.asarray(timesteps), dtype=torch.float32),
        torch.tensor(coefficients, dtype=torch.float32),
        init_scale,
        torch.tensor(noised, dtype=torch.float32),
    )
