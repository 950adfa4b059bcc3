"""Small LoRAs of random weights, in the forms in which they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def make_lora(folder: Path, base: str, name: str, seed: int, xl: bool = False, text: bool = False) -> str:
    """Write a LoRA of a base's U-Net, on attention, feed-forward and convolution layers. text: of its text
    encoder too."""
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(base)
    torch.manual_seed(seed)
    layers = {"unet_lora_layers": _adapted(pipe.unet, ["to_q", "to_k", "to_v", "to_out.0", "proj", "conv1"])}
    if text:
        layers["text_encoder_lora_layers"] = _adapted(pipe.text_encoder, ["q_proj", "v_proj"])
    kind.save_lora_weights(folder, **layers, weight_name=f"{name}.safetensors", safe_serialization=True)
    return str(folder / f"{name}.safetensors")


def _adapted(network: Any, targets: list[str]) -> dict[str, torch.Tensor]:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian")
    network.add_adapter(config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return dict(get_peft_model_state_dict(network))
