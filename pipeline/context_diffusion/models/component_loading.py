"""Loads a pretrained model's components by diffusers' and transformers' own loaders: safetensors only, no
remote code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.hub import split
from context_diffusion.models.resolve import read_json

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
