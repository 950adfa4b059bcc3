"""Rows of a job of FLUX.2 [klein], from files of any size, are what diffusers makes of them, say what the
model was told, and are made again bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from context_diffusion.evaluation.layout import layout_score
from context_diffusion.generation.image_origin import find_origin
from context_diffusion.generation.reproduce import reproduce
from context_diffusion.inputs.context_images import ReferenceImage
from context_diffusion.inputs.decode import resize
from context_diffusion.outputs.encode import read_metadata
from support.klein_job import write_job
from support.klein_rows import MOST_LEVELS, levels_apart
from support.local_job import run_job
from support.tiny_flux2 import klein_reference

STEPS = 3
SCORES = ["layout", "style", "leakage"]
LINES: list[dict[str, Any]] = [
    {"query": "0.png", "context": ["1.jpg"], "prompt": "a misty forest"},
    {
        "query": "1.jpg",
        "context": ["2.png", "3.jpg"],
        "prompt": "",
        "num_inference_steps": 2,
        "width": 96,
        "height": 64,
    },
    {"query": "2.png", "context": ["3.jpg", "4.webp", "5.png"], "width": 64, "height": 64},
    {"query": "3.jpg", "context": "0.png", "prompt": "blue", "num_inference_steps": 5, "seed": 9},
    {"query": "4.webp", "context": ["5.png", "1.jpg"], "prompt": "words " * 100, "context_weights": [1, 0]},
]
READ = [2, 3, 4, 2, 2]  # references, one of the last row has no weight
STYLES = ["image 2", "images 2 to 3", "images 2 to 4", "image 2", "image 2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def rows(folder: Path, folders: dict[bool, Path]) -> list[dict[str, Any]]:
    job = write_job(
        folder, {"base": str(folders[True])}, LINES, settings={"num_inference_steps": STEPS}, score=SCORES
    )
    rows = run_job(job)
    assert [row["error_message"] for row in rows] == [None] * len(LINES)
    return rows


def test_each_row_is_what_diffusers_makes_of_its_files(
    rows: list[dict[str, Any]], folder: Path, pipes: Any
) -> None:
    for row, line, read in zip(rows, LINES, READ, strict=True):
        files = [row["query"], *row["context"]][:read]
        pixels, _ = klein_reference(
            pipes(True),
            [Image.open(folder / name).convert("RGB") for name in files],
            row["full_prompt"],
            seed=row["seed"],
            steps=line.get("num_inference_steps", STEPS),
            width=line.get("width"),
            height=line.get("height"),
        )
        image = np.asarray(Image.open(folder / "out" / row["file_name"]))
        assert levels_apart(image, pixels) <= MOST_LEVELS, row["id"]
        assert (row["height"], row["width"]) == pixels.shape[:2]


def test_what_the_model_was_told_stands_in_the_part_and_in_the_image(
    rows: list[dict[str, Any]], folder: Path
) -> None:
    for row, line, styles in zip(rows, LINES, STYLES, strict=True):
        prompt = line.get("prompt") or ""
        role = "Keep the exact composition of image 1. Render it in the style, palette and texture of"
        told = f"{role} {styles}; copy no objects from them. {prompt}".strip()
        assert row["full_prompt"] == told
        assert row["prompt"] == line.get("prompt")
        file = folder / "out" / row["file_name"]
        assert json.loads(read_metadata(file.read_bytes())["context_diffusion"])["full_prompt"] == told
    assert [row["prompt_truncated"] for row in rows] == [False] * 4 + [True]


def test_each_row_is_scored_against_its_query_at_the_outputs_size(
    rows: list[dict[str, Any]], folder: Path
) -> None:
    for row in rows:
        image = np.asarray(Image.open(folder / "out" / row["file_name"]))
        height, width = image.shape[:2]
        query = ReferenceImage(1024**2).apply(np.asarray(Image.open(folder / row["query"]).convert("RGB")))
        expected = layout_score(image, resize(query, width, height, "crop"))
        assert row["layout_score"] == pytest.approx(expected, abs=1e-4), row["id"]
        assert row["style_score"] is not None


def test_each_image_is_made_again_bit_for_bit(rows: list[dict[str, Any]], folder: Path) -> None:
    for row in rows:
        again = reproduce(find_origin(str(folder / "out" / row["file_name"])), [], None)
        assert (again.identical, again.differs) == (True, []), row["id"]
        assert json.loads(again.texts["context_diffusion"])["full_prompt"] == row["full_prompt"]


def test_a_guided_image_is_made_again_bit_for_bit(folders: dict[bool, Path], tmp_path: Path) -> None:
    line = {"query": "5.png", "context": ["4.webp"], "negative_prompt": "grey"}
    [row] = run_job(write_job(tmp_path, str(folders[False]), [line], settings={"num_inference_steps": 2}))
    assert (row["guidance_scale"], row["lanes"]) == (4.0, 2)
    again = reproduce(find_origin(str(tmp_path / "out" / row["file_name"])), [], None)
    assert (again.identical, again.differs) == (True, [])


def test_an_image_with_a_side_below_the_settings_range_is_made_again(
    folders: dict[bool, Path], tmp_path: Path
) -> None:
    """A long query that is scaled down as a reference: the output has its size where no other is given."""
    model = {"base": str(folders[True]), "max_reference_pixels": 128**2}
    line = {"query": "panorama.png", "context": ["5.png"]}
    [row] = run_job(write_job(tmp_path, model, [line], settings={"num_inference_steps": 1}))
    assert (row["width"], row["height"]) == (352, 32)
    again = reproduce(find_origin(str(tmp_path / "out" / row["file_name"])), [], None)
    assert (again.identical, again.differs) == (True, [])
