"""What the tests of FLUX.2 [klein] share: both variants, saved and loaded once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers import Flux2KleinPipeline

from context_diffusion.pipeline import ContextDiffusion
from support.tiny_flux2 import save_tiny_klein


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return the folders of a model, by whether it is the distilled variant."""
    folder = tmp_path_factory.mktemp("klein")
    return {
        distilled: save_tiny_klein(folder / name, distilled)
        for distilled, name in ((True, "distilled"), (False, "base"))
    }


@pytest.fixture(scope="session")
def models(folders: dict[bool, Path]) -> Any:
    """Return what loads a variant by our loader. It is loaded once: no test changes it."""

    @cache
    def load(distilled: bool) -> ContextDiffusion:
        return ContextDiffusion.from_pretrained(str(folders[distilled]), device="cpu", cpu_threads=1)

    return load


@pytest.fixture(scope="session")
def pipes(folders: dict[bool, Path]) -> Any:
    """Return what loads a variant by diffusers' own loader, once."""

    @cache
    def load(distilled: bool) -> Flux2KleinPipeline:
        return Flux2KleinPipeline.from_pretrained(folders[distilled])

    return load
