"""Published ControlNets and the kinds of maps that they were trained on. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from context_diffusion.core.generate_job import ControlName

# Published ControlNets whose map this package computes, with the scale that their card recommends.
CONTROLNETS: dict[str, tuple[ControlName, float]] = {
    "lllyasviel/control_v11p_sd15_canny": ("canny", 1.0),
    "lllyasviel/sd-controlnet-canny": ("canny", 1.0),
    "diffusers/controlnet-canny-sdxl-1.0": ("canny", 0.5),
    "diffusers/controlnet-canny-sdxl-1.0-mid": ("canny", 0.5),
    "diffusers/controlnet-canny-sdxl-1.0-small": ("canny", 0.5),
    "xinsir/controlnet-canny-sdxl-1.0": ("canny", 1.0),
    "latentcat/control_v1p_sd15_brightness": ("gray", 1.0),
    "lllyasviel/control_v11f1e_sd15_tile": ("none", 1.0),
    "xinsir/controlnet-tile-sdxl-1.0": ("tile", 1.0),
    "lllyasviel/control_v11f1p_sd15_depth": ("depth", 1.0),
    "lllyasviel/sd-controlnet-depth": ("depth", 1.0),
    "diffusers/controlnet-depth-sdxl-1.0": ("depth", 0.5),
    "diffusers/controlnet-depth-sdxl-1.0-mid": ("depth", 0.5),
    "diffusers/controlnet-depth-sdxl-1.0-small": ("depth", 0.5),
    "xinsir/controlnet-depth-sdxl-1.0": ("depth", 1.0),
}
# The control types of xinsir's union ControlNets, by the kinds of maps; tile is one of the promax weights.
UNION_TYPES: dict[str, int] = {
    "openpose": 0,
    "depth": 1,
    "soft_edges": 2,
    "canny": 3,
    "lineart": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
}


def is_union(config: Mapping[str, Any]) -> bool:
    """Return whether a ControlNet's config.json is that of a union ControlNet."""
    return "num_control_type" in config or "Union" in str(config.get("_class_name"))


def control_types(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the kinds of maps that a union ControlNet takes, by its config.json; None: it is a plain one."""
    if not is_union(config):
        return None
    count = config.get("num_control_type", 6)
    return tuple(kind for kind, place in UNION_TYPES.items() if place < count)
