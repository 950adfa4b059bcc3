"""Computes control maps: the layout of a query image for a ControlNet. Knows pixels only (numpy, OpenCV)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from context_diffusion.core.records import Control, Pixels

TILE = 8  # pixels


def query_pixels(image: Pixels) -> Pixels:
    """Return the query unchanged, for ControlNets that read an image."""
    return image


def gray(image: Pixels) -> Pixels:
    """Return the grey values, uint8 (H, W) (ITU-R BT.601 luma)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8)


def canny(image: Pixels) -> Pixels:
    """Draw Canny edges in white on black, with thresholds of 0.66 and 1.33 times the blurred median."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0)
    median = float(np.median(smooth))
    # The bounds keep the thresholds useful for images that are nearly black or white.
    low, high = max(20.0, 0.66 * median), min(200.0, max(40.0, 1.33 * median))
    return cv2.Canny(smooth, low, high).astype(np.uint8)


def soft_edges(image: Pixels) -> Pixels:
    """Draw the Sobel gradient's magnitude, divided by its 99th percentile, in white on black."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0).astype(np.float32)
    magnitude = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    # The minimum of 16 grey levels keeps the noise of a uniform image from being amplified to edges.
    scale = max(float(np.percentile(magnitude, 99)), 16.0)
    return np.clip(magnitude * (255.0 / scale), 0, 255).astype(np.uint8)


def tile(image: Pixels) -> Pixels:
    """Return the query without its details: averaged over squares of TILE pixels, resized back by cubic
    interpolation, as xinsir's tile ControlNets were trained and are shown with factors of 1 to 32."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // TILE), max(1, height // TILE)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


CONTROLS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": query_pixels,
    "canny": canny,
    "gray": gray,
    "soft_edges": soft_edges,
    "tile": tile,
}


def control_map(image: Pixels, kind: str) -> Pixels:
    """Compute a control map, uint8 (H, W, 3), from a query, uint8 (H, W, 3) RGB. kind: a key of CONTROLS."""
    result = CONTROLS[kind](image)
    return np.repeat(result[:, :, None], 3, axis=2) if result.ndim == 2 else result


def controls_of(query: Pixels, kinds: Sequence[str]) -> tuple[Control, ...]:
    """Return a query's control map of each kind, without pixels for a kind that is none of CONTROLS."""
    return tuple(Control(kind, control_map(query, kind) if kind in CONTROLS else None) for kind in kinds)
