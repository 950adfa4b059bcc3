"""Where a model comes from and which version it is. No torch: the driver asks before any engine starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from context_diffusion.errors import ModelError

BUNDLED = Path(__file__).parent / "bundled"


def model_folder(model: str) -> Path:
    """The folder of a model by its name: `bundled` or a folder. Raises ModelError naming what is missing."""
    folder = BUNDLED if model == "bundled" else Path(model)
    if not folder.is_dir():
        raise ModelError(f"model: {model!r} is neither `bundled` nor a folder that is here")
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"model: {folder} has no model_index.json; name the folder that `kind: train` left as model/")
    return folder


def model_size(model: str) -> tuple[int, int]:
    """(image_size, context_size) in pixels, from the index."""
    index = json.loads((model_folder(model) / "model_index.json").read_text())
    return index["image_size"], index["context_size"]


def model_revision(model: str) -> str:
    """A digest over the names and bytes of the model's files: other weights are another model."""
    folder, digest = model_folder(model), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
