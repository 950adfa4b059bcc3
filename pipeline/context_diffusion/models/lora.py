"""LoRA files fused into a model, by diffusers' own loader."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.event_log import LOG
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.resolution.hub import fetch

NAMED = 3  # keys of a LoRA that fit no layer, named in a message


def fuse_loras(pipe: Any, parts: Parts, prefix: str) -> None:
    """Fuse the LoRA files into a diffusers pipeline. prefix: of their keys. Raises ModelError naming the
    file."""
    for number, (file, scale) in enumerate(parts.fused_loras):
        load_lora(pipe, file, f"lora{number}", parts, prefix)
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"lora{number}"])
        pipe.unload_lora_weights()


def load_lora(pipe: Any, file: str, adapter: str, parts: Parts, prefix: str) -> None:
    """Load a LoRA file into a diffusers pipeline, as an adapter of its own. prefix: of its keys. Raises
    ModelError naming the file."""
    folder, _, name = file.rpartition("/")
    path = fetch(folder or ".", name, parts.revision)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter)
        _check(pipe, path, adapter, f"model: lora {file}", parts.base, prefix)
    except ModelError:
        raise
    except Exception as error:
        hint = "; pip install 'context-diffusion[lora]'" if "PEFT" in str(error) else ""
        raise ModelError(f"model: lora {file} cannot be loaded into {parts.base}: {error}{hint}") from error


def _check(pipe: Any, path: Path, adapter: str, what: str, base: str, prefix: str) -> None:
    """Raise ModelError for a LoRA that changes nothing, and warn of one that fits in part.

    diffusers ignores keys that fit no layer, even all of them, and reports it only on a log that is muted
    here."""
    layers = [layer for component in pipe.get_list_adapters() for layer in getattr(pipe, component).modules()]
    if not any(
        adapter in getattr(layer, "lora_B", {}) and layer.lora_B[adapter].weight.any() for layer in layers
    ):
        raise ModelError(
            f"{what} changes no weight of {base}: its keys fit none of its layers; "
            f"was it trained for another kind of model, or saved without the prefix {prefix}?"
        )
    if unused := _unused_keys(_weights(pipe, path), layers, adapter):
        names = ", ".join(unused[:NAMED]) + (", ..." if unused[NAMED:] else "")
        LOG.warn(f"{what} fits {base} only in part: {len(unused)} of its keys fit no layer: {names}")


def _weights(pipe: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return a file's weights as diffusers converts them from other tools' forms: it splits and scales
    some."""
    converted = pipe.lora_state_dict(str(path.parent), weight_name=path.name)
    return dict(converted[0] if isinstance(converted, tuple) else converted)


def _unused_keys(weights: dict[str, torch.Tensor], layers: list[nn.Module], adapter: str) -> list[str]:
    """Return the keys of a LoRA whose weights are in no layer. Compares weights, since naming schemes
    differ."""
    loaded = set()
    for layer in layers:
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            if adapter in getattr(layer, kind, {}):
                loaded |= {
                    (weight.dtype, _digest(weight)) for weight in getattr(layer, kind)[adapter].parameters()
                }
    dtypes = {dtype for dtype, _ in loaded}
    unused = []
    for key, weight in weights.items():
        # An alpha is a number that scales another key's weights: it is in no layer itself.
        if weight.ndim and not any((dtype, _digest(weight.to(dtype))) in loaded for dtype in dtypes):
            unused.append(key)
    return sorted(unused)


def _digest(weight: torch.Tensor) -> bytes:
    """Return a digest of the values in order, for any shape: some files hold 1 x 1 convolutions for linear
    layers."""
    return hashlib.blake2b(
        weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ).digest()
