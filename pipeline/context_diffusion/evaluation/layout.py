"""The layout score: whether an image has its edges where its query has them. Needs no torch."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from context_diffusion.core.records import Pixels

Field = NDArray[np.float32]
EDGE_SCALES = (1.5, 4.0)  # pixels: fine edges, and edges that remain under another texture
BOUNDARY_SCALE = 1.5  # pixels
BOUNDARY_SHARE = 0.3  # threshold as a share of the image's steep gradients
MIN_BOUNDARY_GRADIENT = 1.0  # levels of lightness per pixel
CANNY_UNITS = 64  # per level: Canny takes integers


def as_large_as(image: Pixels, other: Pixels) -> Pixels:
    """Stretch an image to the size of another one."""
    if image.shape == other.shape:
        return image
    return cv2.resize(image, (other.shape[1], other.shape[0]), interpolation=cv2.INTER_AREA).astype(np.uint8)


def gradients(image: Pixels, scale: float) -> tuple[Field, Field]:
    """Return the gradients (H, W) of the lightness across and down, in levels (of 255) per pixel.

    The lightness is smoothed by a Gaussian of `scale` pixels.
    """
    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0].astype(np.float32)
    smooth = cv2.GaussianBlur(lightness, (0, 0), scale)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    return np.asarray(across, np.float32), np.asarray(down, np.float32)


def standard(field: Field) -> Field:
    """Shift and scale a field to mean 0 and std 1; a constant field becomes 0."""
    return (field - field.mean()) / (field.std() + 1e-6)


def edges(image: Pixels, scale: float) -> Field:
    """Return the compressed magnitude of the lightness gradient with mean 0 and std 1. float32 (H, W)."""
    # The square root gives weak edges weight beside strong ones: styles differ in contrast.
    return standard(np.sqrt(np.hypot(*gradients(image, scale))))


def directed(image: Pixels, scale: float) -> NDArray[np.complex64]:
    """Return the compressed magnitude and the doubled angle of the lightness gradient. complex64 (H, W).

    Doubled angles (Knutsson 1989) make an edge from dark to light equal to one from light to dark.
    """
    across, down = gradients(image, scale)
    field = across + np.complex64(1j) * down
    magnitude = np.abs(field) + np.float32(1e-12)
    return np.asarray(field * field / (magnitude * np.sqrt(magnitude)), np.complex64)


def layout_score(image: Pixels, query: Pixels) -> float:
    """Return the mean correlation of the image's and the query's edges over EDGE_SCALES, 0 to 1.

    Edges agree in position and direction. Among 8 queries the score identifies the right one for .980 of 256
    held-out true images, and for .957 without the direction.
    """
    query = as_large_as(query, image)
    correlations = [_correlation(directed(image, scale), directed(query, scale)) for scale in EDGE_SCALES]
    return float(np.clip(np.mean(correlations), 0, 1))


def _correlation(first: NDArray[np.complex64], second: NDArray[np.complex64]) -> float:
    """Return the correlation of two fields, -1 to 1; 0 if one of them is 0 everywhere."""
    return float(np.vdot(first, second).real / (np.linalg.norm(first) * np.linalg.norm(second) + 1e-6))


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
