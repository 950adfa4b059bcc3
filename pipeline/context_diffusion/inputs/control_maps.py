"""Query image -> control map: what the ControlNet sees of the query's layout.

Knows pixels (numpy, OpenCV) only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from context_diffusion.core.records import Control, Pixels


def query_pixels(image: Pixels) -> Pixels:
    """The query itself, its own pixels: for ControlNets that read a picture."""
    return image


def gray(image: Pixels) -> Pixels:
    """The grey picture (ITU-R BT.601 luma)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8)


def canny(image: Pixels) -> Pixels:
    """White Canny edges on black; the thresholds follow the blurred picture's median (.66 and 1.33 of it)."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0)
    median = float(np.median(smooth))
    # A picture that is nearly black or white all over would otherwise get no or only trivial thresholds.
    low, high = max(20.0, 0.66 * median), min(200.0, max(40.0, 1.33 * median))
    return cv2.Canny(smooth, low, high).astype(np.uint8)


def soft_edges(image: Pixels) -> Pixels:
    """The gradient's magnitude (Sobel on a lightly blurred picture) over its 99th percentile, white on black."""
    smooth = cv2.GaussianBlur(gray(image), (0, 0), 1.0).astype(np.float32)
    magnitude = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    # The floor of 16 grey levels keeps the noise of a flat picture from being blown up to edges.
    scale = max(float(np.percentile(magnitude, 99)), 16.0)
    return np.clip(magnitude * (255.0 / scale), 0, 255).astype(np.uint8)


CONTROLS: dict[str, Callable[[Pixels], Pixels]] = {
    "none": query_pixels,
    "canny": canny,
    "gray": gray,
    "soft_edges": soft_edges,
}


def control_map(image: Pixels, kind: str) -> Pixels:
    """Turns a query into its control map.

    image: uint8 (H, W, 3) RGB; kind: a key of CONTROLS. Returns uint8 (H, W, 3).
    """
    result = CONTROLS[kind](image)
    return np.repeat(result[:, :, None], 3, axis=2) if result.ndim == 2 else result


def controls_of(query: Pixels, kinds: Sequence[str]) -> tuple[Control, ...]:
    """A control map of each kind."""
    return tuple(Control(kind, control_map(query, kind)) for kind in kinds)
