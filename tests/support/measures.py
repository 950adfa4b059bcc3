"""Measures of the scores and of the bundled model, which only tests and tests/benchmarks need."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels
from context_diffusion.evaluation.layout import as_large_as, gradients

BOUNDARY_SCALE = 1.5  # pixels
BOUNDARY_SHARE = 0.3  # threshold as a share of the image's steep gradients
MIN_BOUNDARY_GRADIENT = 1.0  # levels of lightness per pixel
CANNY_UNITS = 64  # per level: Canny takes integers


def named_first(scores: NDArray[np.float64]) -> float:
    """Return the share of rows whose own candidate, on the diagonal, has the highest score (N, N)."""
    return float((scores.argmax(1) == np.arange(len(scores))).mean())


def boundaries(image: Pixels) -> NDArray[np.bool_]:
    """Return edges as thin lines (Canny 1986), bool (H, W), with thresholds relative to the gradients."""
    across, down = gradients(image, BOUNDARY_SCALE)
    steep = float(np.percentile(np.hypot(across, down), 99))
    high = max(BOUNDARY_SHARE * steep, MIN_BOUNDARY_GRADIENT) * CANNY_UNITS
    dx, dy = (np.rint(field * CANNY_UNITS).astype(np.int16) for field in (across, down))
    return cv2.Canny(dx, dy, 0.4 * high, high, L2gradient=True) > 0


def boundary_f1(image: Pixels, reference: Pixels, tolerance_px: float = 2) -> float:
    """Return the F1 of the image's boundary pixels against the reference's, 0 to 1.

    A hit lies within `tolerance_px`. As Martin, Fowlkes and Malik 2004, without their one-to-one matching.
    For images of one style, such as an output and its ground truth: a texture that only one of them has
    counts as boundaries. Two images without boundaries score 1.
    """
    image_boundaries = boundaries(image)
    reference_boundaries = boundaries(as_large_as(reference, image))
    if not image_boundaries.any() or not reference_boundaries.any():
        return float(image_boundaries.any() == reference_boundaries.any())
    precision = _share_near(image_boundaries, reference_boundaries, tolerance_px)
    recall = _share_near(reference_boundaries, image_boundaries, tolerance_px)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(pixels: NDArray[np.bool_], targets: NDArray[np.bool_], tolerance_px: float) -> float:
    """Return the share of the pixels that have a target within the tolerance."""
    distance = cv2.distanceTransform((~targets).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((distance[pixels] <= tolerance_px + 1e-3).mean())
