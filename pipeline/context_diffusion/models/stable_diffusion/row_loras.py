"""The LoRAs that rows choose by name: for each a copy of the networks that shares all weights but the LoRA's
own."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from context_diffusion.core.model_parts import Parts
from context_diffusion.core.settings import Settings
from context_diffusion.models.attention import attend_by_lanes
from context_diffusion.models.lora import load_lora
from context_diffusion.models.stable_diffusion.prompts import PromptEncoder

LoraKey = tuple[str, float]  # name and scale
COPIES = 64  # of networks at other scales than 1, which hold no weights of their own


@dataclass(frozen=True)
class Networks:
    """What a LoRA changes: the U-Net with its cross-attention layers, and the encoding of prompts. key: of
    the LoRA; None: without one."""

    key: LoraKey | None
    unet: Any
    layers: list[Attention]
    text: PromptEncoder

    @classmethod
    def of(cls, pipe: Any, key: LoraKey | None, xl: bool, parts: Parts) -> Networks:
        """Prepare a pipeline's networks for the engine. With LoRAs to choose, no weights are copied: the
        projections of self-attention are not fused."""
        layers = attend_by_lanes(pipe.unet, fuse=not parts.loras)
        text = PromptEncoder(pipe, xl, parts.clip_skip, parts.prompt_chunks)
        return cls(key, pipe.unet, layers, text)


def lora_key(settings: Settings) -> LoraKey | None:
    """Return what decides which networks a row needs."""
    return None if settings.lora is None else (settings.lora, settings.lora_scale)


def load_row_loras(pipe: Any, parts: Parts) -> dict[str, Any]:
    """Return a copy of a diffusers pipeline with each LoRA, by name. Raises ModelError naming the file."""
    copies = {}
    for name, file in parts.loras.items():
        copies[name] = _copy(pipe)
        load_lora(copies[name], file, ADAPTER, parts, "unet.")
    return copies


ADAPTER = "row"  # the name of the LoRA in each copy


class RowNetworks:
    """Find the networks of a row: the base's, or those with its LoRA at its scale. Safe for several threads.

    pipes: with each LoRA, by name."""

    def __init__(self, base: Any, pipes: dict[str, Any], xl: bool, parts: Parts) -> None:
        self._pipes, self._xl, self._parts = pipes, xl, parts
        self.base = Networks.of(base, None, xl, parts)
        self._at_scale: OrderedDict[LoraKey, Networks] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: LoraKey | None) -> Networks:
        """Return the networks for a LoRA's name and scale."""
        if key is None:
            return self.base
        with self._lock:
            if key not in self._at_scale:
                name, scale = key
                pipe = _copy(self._pipes[name])
                pipe.set_adapters([ADAPTER], [scale])
                self._at_scale[key] = Networks.of(pipe, key, self._xl, self._parts)
            self._at_scale.move_to_end(key)
            while len(self._at_scale) > COPIES:
                self._at_scale.popitem(last=False)
            return self._at_scale[key]


def _copy(pipe: Any) -> Any:
    """Copy a diffusers pipeline with its U-Net and text encoders. All weights are shared."""
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name, None)]
    networks = {name: _sharing_copy(getattr(pipe, name)) for name in names}
    names_of_options = ("force_zeros_for_empty_prompt", "requires_safety_checker")
    options = {name: pipe.config[name] for name in names_of_options if name in pipe.config}
    return type(pipe)(**pipe.components | networks | options)


def _sharing_copy(network: nn.Module) -> nn.Module:
    """Copy a network's modules; the copy has the same parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
