"""Scores of a picture against its query and its contexts: edges and colours, numpy and OpenCV alone."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]
STYLE_SCALE = 20.0  # a mean distance of so many Lab units has the score 1/e


def edges(image: Pixels) -> Field:
    """Where borders are: the lightness gradient's magnitude, compressed, mean 0, deviation 1. float32 (H, W)."""
    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0].astype(np.float32)
    smooth = cv2.GaussianBlur(lightness, (0, 0), 1.5)
    # The square root lets weak borders count beside strong ones: styles differ in contrast.
    field = np.sqrt(np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)))
    return (field - field.mean()) / (field.std() + 1e-6)


def layout_score(image: Pixels, query: Pixels) -> float:
    """How far the picture's borders are the query's: correlation of their edge fields, 0 to 1."""
    if query.shape != image.shape:
        query = cv2.resize(query, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return float(np.clip((edges(image) * edges(query)).mean(), 0, 1))


def _directions() -> Field:
    """Unit vectors over the half sphere, for the sliced distance: a fixed spiral."""
    steps = np.arange(24) + 0.5
    height, angle = 1 - steps / 24, np.pi * (1 + 5**0.5) * steps
    radius = np.sqrt(1 - height**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], 1).astype(np.float32)


def palette(images: list[Pixels]) -> Field:
    """The colours of some pictures: quantiles of their Lab values along fixed directions. float32 (24, 64)."""
    lab = [cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3) for image in images]
    return np.quantile(np.concatenate(lab) @ _directions().T, np.linspace(0.01, 0.99, 64), axis=0).T.astype(np.float32)


def palette_distance(first: Field, second: Field) -> float:
    """Sliced Wasserstein distance of two palettes in Lab units (Bonneel et al. 2015)."""
    return float(np.abs(first - second).mean())


def style_score(image: Pixels, contexts: list[Pixels]) -> float:
    """How far the picture's colours are the contexts', 0 to 1: exp(-distance / STYLE_SCALE)."""
    return float(np.exp(-palette_distance(palette([image]), palette(contexts)) / STYLE_SCALE))


def named_first(scores: NDArray[np.float64]) -> float:
    """The share of rows whose own candidate, on the diagonal, has the highest score. scores: (N, N) square."""
    return float((scores.argmax(1) == np.arange(len(scores))).mean())
