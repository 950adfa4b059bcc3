"""Leakage: what came from the wrong side. A context's layout, the query's colours. numpy and OpenCV alone."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels
from context_diffusion.evaluation.layout import EDGE_SCALES, Field, as_large_as, edges, standard
from context_diffusion.evaluation.style import distances, palette

Spectrum = NDArray[np.complexfloating]
ELSEWHERE = 1 / 8  # of the side: a displacement from here on is another place
LARGEST = 256  # pixels a side that layouts are compared at: a fifth of the time at 512, and no detail is a layout
LEAST_DIFFERENCE = 5.0  # Lab units: palettes nearer than this are the same colours


def layout_leakage(image: Pixels, query: Pixels, contexts: list[Pixels]) -> float:
    """How much of the picture's layout is a context's and not the query's, 0 to 1: the context that shows most counts.

    The correlation of the edge fields of picture and context, after what either shares with the query is taken out of
    it (a partial correlation). A texture correlates too, and may: it is style. But a texture repeats, a layout does not:
    so the best correlation r' at another place is taken off, (r - r') / (1 - r'). 1: the context's picture itself;
    about a half: both laid over each other. A context's own repeated figures may so be taken for texture.
    """
    if (side := max(image.shape[:2])) > LARGEST:
        width, height = (max(1, round(length * LARGEST / side)) for length in image.shape[1::-1])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    query = as_large_as(query, image)
    asked = [edges(query, scale) for scale in EDGE_SCALES]
    rests = [_rest(edges(image, scale), taken) for scale, taken in zip(EDGE_SCALES, asked, strict=True)]
    shares = []
    for context in (as_large_as(one, image) for one in contexts):
        shown = [_rest(edges(context, scale), taken) for scale, taken in zip(EDGE_SCALES, asked, strict=True)]
        shares.append(np.mean([_own(*pair, image.shape[:2]) for pair in zip(rests, shown, strict=True)]))
    return float(np.clip(max(shares), 0, 1))


def _rest(field: Field, query: Field) -> Spectrum:
    """What an edge field (H, W) does not share with the query's, as its spectrum."""
    return np.asarray(np.fft.rfft2(standard(field - (field * query).mean() * query)))


def _own(image: Spectrum, context: Spectrum, shape: tuple[int, ...]) -> float:
    """r here beyond r' elsewhere."""
    correlation = np.fft.irfft2(image * context.conj(), shape) / (shape[0] * shape[1])
    down, across = (np.minimum(np.arange(n), n - np.arange(n)) >= ELSEWHERE * n for n in shape)
    elsewhere = max(0.0, float(correlation[down[:, None] | across[None]].max()))
    return (float(correlation[0, 0]) - elsewhere) / (1 - min(elsewhere, 0.99))


def colour_leakage(image: Pixels, query: Pixels, contexts: list[Pixels]) -> float | None:
    """How much of the picture's colour is the query's and not the contexts', 0 to 1. None: no leak could be told.

    Two shares, of palettes in Lab: how far the picture's colours left the contexts', as a share of how far the query's
    lie from them; and how much nearer to the query's they came than the contexts' are. The smaller one counts: colours
    that neither shows are wrong, but not the query's. 1: the query's own colours; about a half: halfway between.
    Where query and contexts have the same colours, within LEAST_DIFFERENCE, the answer is None.
    """
    made, asked, shown = palette([image]), palette([query]), palette(contexts)
    between = distances(asked, shown)
    of_query, of_contexts = float(between.min(1).mean()), float(between.min(0).mean())
    if min(of_query, of_contexts) < LEAST_DIFFERENCE:
        return None
    left = float(distances(made, shown).min(1).mean()) / of_query
    came = 1 - float(distances(made, asked).min(1).mean()) / of_contexts
    return float(np.clip(min(left, came), 0, 1))
