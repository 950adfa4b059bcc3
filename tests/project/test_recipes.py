"""The recipes of pipeline/README.md work: each is applied to a copy of the package and its tests, and what it
adds is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = dict(
    re.findall(
        r"### ([^\n]+)\n(?:(?!###).)*?```diff\n(.*?)```",
        (ROOT / "pipeline/README.md").read_text(),
        flags=re.S,
    )
)
# The test that each adds: where, and a part of its name.
ADDED = {
    "A control map": ("tests/inputs/test_control_maps.py", "four_tones"),
    "A scheduler": ("tests/engine/test_scheduler_tables.py", "dpmpp_sde_karras-epsilon-leading"),
    "A context encoder": ("tests/models/test_context_encoders.py", "patches[dinov3"),
    "A score": ("tests/evaluation/test_tone.py", "tone_score"),
    "An image format": ("tests/generation/test_write_shard.py", "again[avif"),
    "A backbone": ("tests/models/test_pixel_backbone.py", "batch_of_pixels"),
}


def change(path: Path, hunk: list[str]) -> None:
    """What stands in the lines without `+` stands in the file exactly once; the lines without `-` take its
    place."""
    old, new = ("\n".join(line[1:] for line in hunk if line[0] != sign) for sign in "+-")
    text = path.read_text() if path.exists() else ""
    assert text.count(old) == 1 if old else not text, f"{path}: {text.count(old)} places are like\n{old}"
    path.write_text(text.replace(old, new, 1) if old else new + "\n")


def follow(recipe: str, folder: Path) -> None:
    path, hunk = folder, list[str]()
    for line in [*recipe.splitlines(), "@@"]:
        if line[:1] in ("+", "-", " "):
            hunk.append(line)
            continue
        if hunk:
            change(path, hunk)
        path, hunk = folder / line if line != "@@" else path, []


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests with all recipes in them: most of a test's time would be torch's import."""
    folder = tmp_path_factory.mktemp("recipes")
    weights = ("bundled", "judge")
    for name, left_out in (("tests", ()), ("pipeline", weights)):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    for name in weights:
        [there] = (ROOT / "pipeline").rglob(name)
        (folder / there.relative_to(ROOT)).symlink_to(there)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for recipe in RECIPES.values():
        follow(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def told(copy: Path) -> str:
    """What pytest says of what they add."""
    chosen = "four_tones or dpmpp_sde_karras or dinov3 or tone_score or avif or batch_of_pixels"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rA",
        "-p",
        "no:cacheprovider",
        *(where for where, _ in ADDED.values()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy / "pipeline"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-k", chosen], cwd=copy, capture_output=True, text=True, env=environment)
    return done.stdout


def test_each_recipe_fits_the_files_that_it_changes(copy: Path) -> None:
    assert list(RECIPES) == list(ADDED)
    assert all((copy / where).exists() for where, _ in ADDED.values())
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "F821",
        "--no-cache",
        "--output-format",
        "concise",
    ]
    undefined = subprocess.run([*ruff, "pipeline", "tests"], cwd=copy, capture_output=True, text=True)
    assert undefined.returncode == 0, undefined.stdout


@pytest.mark.slow
@pytest.mark.parametrize("title", ADDED)
def test_a_recipe_is_all_that_it_takes(title: str, told: str) -> None:
    where, part = ADDED[title]
    ends = re.findall(rf"^(PASSED|FAILED|ERROR) {re.escape(where)}\S*{re.escape(part)}", told, flags=re.M)
    assert ends, told
    assert set(ends) == {"PASSED"}, told
