"""Loads a pretrained model's components by diffusers' and transformers' own loaders: safetensors only, no
remote code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.event_log import LOG
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.resolution.hub import fetch_file, read_json, split
from context_diffusion.models.resolution.single_file import (
    CLIP,
    UNET,
    VAES,
    XL_CLIP,
    is_single_file,
    read_checkpoint,
)
from context_diffusion.models.resolution.single_file_configuration import fetch_configuration

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ComponentLoader:
    """Loads components in the dtype that the parts name: `auto` is bfloat16 on a GPU, float32 on a CPU."""

    parts: Parts
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks."""
        on_gpu = self.parts.dtype == "auto" and self.device.type == "cuda"
        return torch.bfloat16 if on_gpu else DTYPES.get(self.parts.dtype, torch.float32)

    def component(self, kind: Any, part: str) -> Any:
        """Load one of diffusers' models, checking its class: the loader would fill another model's folder
        with random weights."""
        class_name = read_json(part, "config.json", self.parts.revision).get("_class_name")
        if class_name != kind.__name__:
            raise ModelError(f"model: {part} is a {class_name}, expected a {kind.__name__}")
        return self(kind, part)

    def __call__(self, kind: Any, part: str, **components: Any) -> Any:
        """Call kind.from_pretrained for a part at its commit; without the variant if the part has none."""
        local = Path(part).exists()
        repo, folder = (part, "") if local else split(part)
        revision = None if local else self.parts.revision.get(repo)
        options = {"revision": revision, "use_safetensors": True, "dtype": self.dtype}
        options |= {"subfolder": folder} if folder else {}
        problems: list[Exception] = []
        wanted = self.parts.variant if self.dtype != torch.float32 else None
        for variant in dict.fromkeys((wanted, None)):
            try:
                return kind.from_pretrained(
                    repo, **options, **components, **({"variant": variant} if variant else {})
                )
            except Exception as error:  # loaders may raise any exception on bad files
                problems.append(error)
        raise ModelError(f"model: {part} cannot be loaded as {kind.__name__}: {problems[-1]}") from problems[
            -1
        ]

    def base(self, kind: Any, **components: Any) -> Any:
        """Load the base as a pipeline of diffusers, from its folder or its single file."""
        parts = self.parts
        if not is_single_file(parts.base):
            return self(kind, parts.base, **components)
        path = fetch_file(parts.base, parts.revision)
        folder = fetch_configuration(parts.configuration, parts.revision)
        try:
            pipe = kind.from_single_file(
                str(path), config=str(folder), local_files_only=True, dtype=self.dtype, **components
            )
        except Exception as error:  # the loader may raise any exception on bad files
            lacking = "lacks weights of the configuration" if "meta tensor" in str(error) else ""
            problem = lacking or "cannot be loaded with the configuration"
            raise ModelError(f"model: {parts.base} {problem} {parts.configuration}: {error}") from error
        check_weights(pipe, parts, set(components))
        return pipe


def check_weights(pipe: Any, parts: Parts, replaced: set[str]) -> None:
    """Raise ModelError for a single file that lacks weights of its configuration, and warn of one with more.

    replaced: components that are not the file's. diffusers ignores surplus weights, and leaves missing ones
    empty, or random where accelerate is not installed."""
    checkpoint = read_checkpoint(parts.base, parts.revision)
    mismatch = f"model: {parts.base} does not fit the configuration {parts.configuration}"
    prefixes = {"unet": (UNET,), "vae": VAES, "text_encoder": (CLIP, XL_CLIP)}
    for name, component in pipe.components.items():
        if name in replaced or not isinstance(component, nn.Module):
            continue
        weights = list(component.parameters())
        stored = checkpoint.count(*prefixes.get(name, ())) or len(weights)  # those of open_clip are others
        lacking = max(len(weights) - stored, sum(weight.is_meta for weight in weights))
        if lacking:
            raise ModelError(f"{mismatch}: it lacks {lacking} of the {len(weights)} weights of its {name}")
        if name == "unet" and stored > len(weights):
            LOG.warn(f"{mismatch}: {stored - len(weights)} weights of its U-Net have no place in it")
