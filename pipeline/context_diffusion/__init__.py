"""Context-aware image generation at scale: layout from a query, style from contexts, meaning from a
prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from context_diffusion.image_tensors import ImageTensor, load_image_as_tensor, to_image
    from context_diffusion.pipeline import ContextDiffusion

__all__ = ["ContextDiffusion", "ImageTensor", "load_image_as_tensor", "to_image"]

_HOME = {
    "ContextDiffusion": "context_diffusion.pipeline",
    "ImageTensor": "context_diffusion.image_tensors",
    "load_image_as_tensor": "context_diffusion.image_tensors",
    "to_image": "context_diffusion.image_tensors",
}


def __getattr__(name: str) -> Any:
    """torch and diffusers load when a name of the API is first used, not at import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("context-diffusion")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
