"""Control maps of query images: the layout that a ControlNet reads. Knows pixels (numpy, OpenCV) only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from context_diffusion.core.records import Control, Pixels


def query_pixels(image: Pixels) -> Pixels:
    """Return the query itself, for ControlNets that read an image."""
    return image


def gray(image: Pixels) -> Pixels:
    """Return the luma (ITU-R BT.601)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8)


def canny(image: Pixels) -> Pixels:
    """Return white Canny edges on black; the thresholds are .66 and 1.33 of the blurred image's median."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0)
    median = float(np.median(smooth))
    # Without these bounds an almost black or white image would have meaningless thresholds.
    low, high = max(20.0, 0.66 * median), min(200.0, max(40.0, 1.33 * median))
    return cv2.Canny(smooth, low, high).astype(np.uint8)


def soft_edges(image: Pixels) -> Pixels:
    """Return the gradient's magnitude (Sobel on a slightly blurred image) over its 99th percentile, white on
    black."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0).astype(np.float32)
    magnitude = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    # The minimum of 16 grey levels keeps the noise of a flat image from becoming edges.
    scale = max(float(np.percentile(magnitude, 99)), 16.0)
    return np.clip(magnitude * (255.0 / scale), 0, 255).astype(np.uint8)


CONTROLS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": query_pixels,
    "canny": canny,
    "gray": gray,
    "soft_edges": soft_edges,
}


def control_map(image: Pixels, kind: str) -> Pixels:
    """Compute the control map of a query.

    image: uint8 (H, W, 3) RGB; kind: a key of CONTROLS. Returns uint8 (H, W, 3).
    """
    result = CONTROLS[kind](image)
    return np.repeat(result[:, :, None], 3, axis=2) if result.ndim == 2 else result


def controls_of(query: Pixels, kinds: Sequence[str]) -> tuple[Control, ...]:
    """Compute a control map of each kind."""
    return tuple(Control(kind, control_map(query, kind)) for kind in kinds)
