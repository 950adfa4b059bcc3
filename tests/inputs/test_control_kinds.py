"""Which control maps are computed from a query, and the tile map."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from context_diffusion.core.generate_job import ControlName
from context_diffusion.core.records import no_map
from context_diffusion.inputs.control_maps import CONTROLS, control_map, controls_of
from context_diffusion.models.resolution.controlnets import CONTROLNETS, UNION_TYPES, control_types
from support.tiny import picture


def test_a_tile_map_keeps_the_colours_of_squares_and_no_detail() -> None:
    query = picture(1, 64, 96)
    noise = np.random.default_rng(2).integers(-30, 31, query.shape)
    noisy = np.clip(query.astype(int) + noise, 0, 255).astype(np.uint8)
    tile = control_map(noisy, "tile")
    assert (tile.shape, tile.dtype) == (noisy.shape, np.uint8)
    assert np.array_equal(tile, control_map(noisy.copy(), "tile"))
    squares = [one.reshape(8, 8, 12, 8, 3).mean((1, 3)) for one in (noisy.astype(float), tile.astype(float))]
    assert np.abs(squares[0] - squares[1]).mean() < 25, "the colours of the squares"
    assert np.corrcoef(squares[0].ravel(), squares[1].ravel())[0, 1] > 0.95
    steps = np.abs(np.diff(tile.astype(int), axis=1))
    assert steps.max() < np.abs(np.diff(noisy.astype(int), axis=1)).max() / 2, "no edges, no noise"
    plain = control_map((128 + noise).astype(np.uint8), "tile").astype(int)
    assert np.abs(plain - 128).max() < 15, "noise is averaged, not sampled"


@pytest.mark.parametrize("size", [(16, 16), (16, 400), (72, 136), (1, 1), (5, 20)])
def test_a_tile_map_is_as_large_as_its_query(size: tuple[int, int]) -> None:
    query = np.full((*size, 3), (250, 3, 90), np.uint8)
    assert np.array_equal(control_map(query, "tile"), query)


def test_a_kind_is_computed_or_left_to_the_engine_or_to_the_row() -> None:
    kinds = [kind for kind in get_args(ControlName) if kind != "disabled"]
    query = picture(3)
    computed = {c.kind for c in controls_of(query, kinds) if c.pixels is not None}
    assert computed == set(CONTROLS) == {"none", "canny", "gray", "soft_edges", "tile"}
    assert "model.depth_estimator" in no_map("depth")
    assert "control_image" in no_map("lineart")
    assert {*UNION_TYPES} < {*kinds}


def test_published_controlnets_have_maps_that_exist() -> None:
    assert {kind for kind, _ in CONTROLNETS.values()} <= {*CONTROLS, "depth"}
    assert CONTROLNETS["xinsir/controlnet-tile-sdxl-1.0"] == ("tile", 1.0)
    assert {name: scale for name, (kind, scale) in CONTROLNETS.items() if kind == "depth"} == {
        "lllyasviel/control_v11f1p_sd15_depth": 1.0,
        "lllyasviel/sd-controlnet-depth": 1.0,
        "diffusers/controlnet-depth-sdxl-1.0": 0.5,
        "diffusers/controlnet-depth-sdxl-1.0-mid": 0.5,
        "diffusers/controlnet-depth-sdxl-1.0-small": 0.5,
        "xinsir/controlnet-depth-sdxl-1.0": 1.0,
    }


def test_the_types_of_a_union_are_those_of_its_configuration() -> None:
    assert control_types({"_class_name": "ControlNetModel"}) is None
    six = control_types({"_class_name": "ControlNetUnionModel", "num_control_type": 6})
    assert six == ("openpose", "depth", "soft_edges", "canny", "lineart", "normal", "segment")
    assert control_types({"_class_name": "ControlNetModel_Union"}) == six
    assert control_types({"num_control_type": 8}) == (*six, "tile")
