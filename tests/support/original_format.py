"""Small Stable Diffusion bases as one file in the original keys, as communities publish checkpoints.

The inverse of what diffusers' from_single_file does, written apart from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from support.tiny_diffusers import make_base

Weights = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def make_published_base(folder: Path, xl: bool = False) -> str:
    """make_base, for XL with text encoders of two widths, as the published ones are: loaders tell them apart
    by it."""
    base = make_base(folder, xl)
    if not xl:
        return base
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    config = pipe.text_encoder.config.to_dict()
    with torch.no_grad():
        for name, kind, width in (
            ("text_encoder", CLIPTextModel, 24),
            ("text_encoder_2", CLIPTextModelWithProjection, 40),
        ):
            encoder = kind(CLIPTextConfig.from_dict(config | {"hidden_size": width})).eval()
            for weight in encoder.parameters():
                weight.mul_(2.0 if weight.ndim == 2 else 1.0)
            pipe.register_modules(**{name: encoder})
    pipe.save_pretrained(base, safe_serialization=True)
    return base


def save_original(
    base: str, file: Path, xl: bool = False, open_clip: bool = False, dtype: torch.dtype = torch.float32
) -> str:
    """Write a base to one file. open_clip: with the text encoder as Stable Diffusion 2.x has it."""
    weights = original_weights(base, xl, open_clip)
    save_file(
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()},
        file,
    )
    return str(file)


def original_weights(base: str, xl: bool = False, open_clip: bool = False) -> Weights:
    """Return a base's weights by their original keys."""
    pipe: Any = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(base)
    weights = {f"model.diffusion_model.{key}": value for key, value in _unet(pipe.unet).items()}
    weights |= {f"first_stage_model.{key}": value for key, value in _vae(pipe.vae).items()}
    weights["alphas_cumprod"] = torch.linspace(1, 0, 1000)  # what is not needed stands in them too
    if xl:
        weights |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        weights |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif open_clip:
        weights |= _open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        weights |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return {key: value.contiguous().clone() for key, value in weights.items()}


def _unet(unet: Any) -> Weights:
    layers = unet.config.layers_per_block + 1

    def place(block: str, module: str, layer: int, key: str) -> str:
        """down_blocks.B.resnets.L.KEY -> input_blocks.N.0.KEY, and so on."""
        outside = "input_blocks" if block.startswith("down") else "output_blocks"
        at = int(block.rpartition(".")[2]) * layers
        if module == "downsamplers":
            return f"input_blocks.{at + layers}.0.op.{key.removeprefix('conv.')}"
        if module == "upsamplers":  # after the attention, if the block has one
            attends = "CrossAttn" in unet.config.up_block_types[at // layers]
            return f"output_blocks.{at + layers - 1}.{2 if attends else 1}.{key}"
        number = at + layer + (1 if outside == "input_blocks" else 0)
        return f"{outside}.{number}.{'01'[module == 'attentions']}.{key}"

    weights = {}
    for name, value in unet.state_dict().items():
        found = re.fullmatch(r"((?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
        if not found:
            stem, _, last = name.rpartition(".")
            weights[f"{UNET[stem]}.{last}"] = value
            continue
        block, module, layer, key = found[1], found[2], int(found[3]), found[4]
        if module == "resnets":
            stem, _, last = key.rpartition(".")
            key = f"{RESNET[stem]}.{last}"
        if block == "mid_block":
            weights[f"middle_block.{1 if module == 'attentions' else 2 * layer}.{key}"] = value
        else:
            weights[place(block, module, layer, key)] = value
    return weights


def _vae(vae: Any) -> Weights:
    last = len(vae.config.block_out_channels) - 1
    weights = {}
    for name, value in vae.state_dict().items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = key.replace("to_out.0", "proj_out").replace(".to_", ".")
            value = value[:, :, None, None] if value.ndim == 2 else value  # 1 x 1 convolutions there
        weights[key] = value
    return weights


def _whole_names(encoder: Any) -> Weights:
    """The text encoder's weights by their names of old, which begin with text_model."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in encoder.state_dict().items()
    }


def _clip(encoder: Any, prefix: str) -> Weights:
    weights = {f"{prefix}{key}": value for key, value in _whole_names(encoder).items()}
    return weights | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def _open_clip(encoder: Any, prefix: str) -> Weights:
    names = _whole_names(encoder)
    weights = {f"{prefix}{theirs}": names[ours] for ours, theirs in OPEN_CLIP.items()}
    if "text_projection.weight" in names:
        weights[f"{prefix}text_projection"] = names["text_projection.weight"].T
    for layer in range(encoder.config.num_hidden_layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            joined = [names[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(joined)
            for before, after in OPEN_CLIP_LAYER.items():
                weights[f"{theirs}.{after}.{kind}"] = names[f"{ours}.{before}.{kind}"]
    return weights
