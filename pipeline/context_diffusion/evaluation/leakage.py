"""The leakage scores: a context's layout or the query's colours in an image. Needs no torch."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels
from context_diffusion.evaluation.layout import EDGE_SCALES, Field, as_large_as, edges, standard
from context_diffusion.evaluation.style import distances, palette

Spectrum = NDArray[np.complexfloating]
ELSEWHERE = 1 / 8  # of the side: a larger displacement counts as another position
MAX_SIDE = 256  # pixels at which layouts are compared: a fifth of the time at 512, without loss of layout
MIN_DIFFERENCE = 5.0  # Lab units: palettes that are nearer count as the same colours


def layout_leakage(image: Pixels, query: Pixels, contexts: list[Pixels]) -> float:
    """Return how much of the image's layout comes from a context and not from the query, 0 to 1.

    The context with the highest leakage counts. The score is the correlation r of the edge fields of image
    and context, after removing what each shares with the query (a partial correlation). A shared texture
    correlates too, but is style; textures repeat and layouts do not, so the best correlation r' at another
    position is removed: (r - r') / (1 - r'). 1: the context's image itself; about 0.5: a blend of both.
    Figures that a context repeats may be mistaken for texture.
    """
    side = max(image.shape[:2])
    if side > MAX_SIDE:
        width, height = (max(1, round(length * MAX_SIDE / side)) for length in image.shape[1::-1])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    query = as_large_as(query, image)
    query_edges = [edges(query, scale) for scale in EDGE_SCALES]
    image_residuals = _residuals(image, query_edges)
    leakages = []
    for context in contexts:
        context_residuals = _residuals(as_large_as(context, image), query_edges)
        by_scale = zip(image_residuals, context_residuals, strict=True)
        leakages.append(np.mean([_correlation_here(*residuals, image.shape[:2]) for residuals in by_scale]))
    return float(np.clip(max(leakages), 0, 1))


def _residuals(image: Pixels, query_edges: list[Field]) -> list[Spectrum]:
    """Return at each scale the spectrum of an image's edges (H, W) minus what they share with the query's."""
    residuals: list[Spectrum] = []
    for scale, query_field in zip(EDGE_SCALES, query_edges, strict=True):
        field = edges(image, scale)
        residual = standard(field - (field * query_field).mean() * query_field)
        residuals.append(np.asarray(np.fft.rfft2(residual)))
    return residuals


def _correlation_here(image: Spectrum, context: Spectrum, shape: tuple[int, ...]) -> float:
    """Return (r - r') / (1 - r'), of the correlation r without displacement and the best one r' elsewhere."""
    correlation = np.fft.irfft2(image * context.conj(), shape) / (shape[0] * shape[1])
    down, across = (np.minimum(np.arange(n), n - np.arange(n)) >= ELSEWHERE * n for n in shape)
    elsewhere = max(0.0, float(correlation[down[:, None] | across[None]].max()))
    return (float(correlation[0, 0]) - elsewhere) / (1 - min(elsewhere, 0.99))


def colour_leakage(image: Pixels, query: Pixels, contexts: list[Pixels]) -> float | None:
    """Return how much of the image's colours come from the query and not from the contexts, 0 to 1.

    The smaller of two shares counts, both from palettes in Lab: the distance of the image's colours from the
    contexts', relative to that of the query's; and how much nearer they are to the query's than the contexts'
    are. So colours of neither are no leak. 1: the query's own colours; about 0.5: halfway between. None:
    query and contexts have the same colours, within MIN_DIFFERENCE.
    """
    image_colours = palette([image])
    query_colours = palette([query])
    context_colours = palette(contexts)
    between = distances(query_colours, context_colours)
    query_to_contexts = float(between.min(1).mean())
    contexts_to_query = float(between.min(0).mean())
    if min(query_to_contexts, contexts_to_query) < MIN_DIFFERENCE:
        return None
    away_from_contexts = float(distances(image_colours, context_colours).min(1).mean()) / query_to_contexts
    towards_query = 1 - float(distances(image_colours, query_colours).min(1).mean()) / contexts_to_query
    return float(np.clip(min(away_from_contexts, towards_query), 0, 1))
