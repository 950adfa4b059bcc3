"""Small Stable Diffusion components of the real classes with random weights, saved in the public formats: a
base, ControlNets, an image encoder, IP-Adapters, a safety checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterPlusImageProjection,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from context_diffusion.core.records import Pixels

SIDE, WIDTH, VISION = 64, 32, 64  # pixels, text, image encoder


def make_base(
    folder: Path,
    xl: bool = False,
    seed: int = 0,
    guidance_width: int | None = None,
    whole: bool = False,
    width: int = WIDTH,
) -> str:
    """guidance_width: of the guidance scale's embedding, which an LCM's U-Net reads. whole: all layers of the
    published U-Net, made narrow. width: of each text encoder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "words")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    parts: dict[str, Any] = {
        "vae": _vae(),
        "unet": _unet(xl, guidance_width, whole, width),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    parts["text_encoder"] = _text(CLIPTextModel, tokenizer, width)
    if xl:
        pipe = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=_text(CLIPTextModelWithProjection, tokenizer, width),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )
    else:
        own = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **own)
    pipe.save_pretrained(folder / "base", safe_serialization=True)
    return str(folder / "base")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token a letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def _text(kind: Any, tokenizer: CLIPTokenizer, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return _loud(kind(config).eval(), 2.0)


def _vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, sample_size=SIDE, **blocks
    )
    with torch.no_grad():  # a random decoder is grey: its pictures show what the latents are
        raw = vae.decode(torch.randn(4, 4, 8, 8)).sample
        vae.decoder.conv_out.weight.mul_(0.5 / raw.std())
    return vae


def _whole_sizes(xl: bool) -> dict[str, Any]:
    """The layers of the published U-Nets, 16 and 70 cross-attentions, in narrow channels."""
    sizes = {"layers_per_block": 2, "norm_num_groups": 8, "cross_attention_dim": 2 * WIDTH if xl else WIDTH}
    if not xl:
        return sizes | {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": 2}
    return sizes | {
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (2, 4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        **_XL,
    }


_XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}


def _sizes(xl: bool) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 2 * WIDTH if xl else WIDTH,
        "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    }
    if xl:
        sizes |= _XL | {"transformer_layers_per_block": (1, 2)}
    return sizes


def _unet(
    xl: bool, guidance_width: int | None = None, whole: bool = False, width: int = WIDTH
) -> UNet2DConditionModel:
    sizes = _whole_sizes(xl) if whole else _sizes(xl)
    sizes["cross_attention_dim"] = 2 * width if xl else width
    if not whole:
        sizes["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    elif xl:
        sizes["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(sample_size=SIDE // 2, time_cond_proj_dim=guidance_width, **sizes)
    if guidance_width:
        nn.init.normal_(unet.time_embedding.cond_proj.weight, std=2.0)
    if whole:  # so many loud layers would multiply the rounding of each
        return unet
    return _loud(_loud(unet, 1.6 if xl else 2.6, "attn2"), 2.0, "attn2.to_v")


def make_controlnet(folder: Path, xl: bool = False, seed: int = 1, whole: bool = False) -> str:
    torch.manual_seed(seed)
    sizes = _whole_sizes(xl) if whole else _sizes(xl)
    net = _heard(ControlNetModel(conditioning_embedding_out_channels=(8, 16), **sizes))
    net.save_pretrained(folder / f"controlnet{seed}", safe_serialization=True)
    return str(folder / f"controlnet{seed}")


def make_union_controlnet(folder: Path, types: int = 6, seed: int = 7) -> str:
    """A union ControlNet for XL. types: control types; the promax one has 8."""
    torch.manual_seed(seed)
    sizes = _sizes(xl=True)
    width = sizes["block_out_channels"][0]
    net = ControlNetUnionModel(
        conditioning_embedding_out_channels=(8, 16),
        num_control_type=types,
        num_trans_channel=width,
        num_proj_channel=width,
        num_trans_head=4,
        **sizes,
    )
    nn.init.normal_(net.spatial_ch_projs.weight, std=0.5)
    _loud(net, 6.0, "control_add_embedding")
    _heard(net).save_pretrained(folder / f"union{seed}", safe_serialization=True)
    return str(folder / f"union{seed}")


def _heard(net: Any) -> Any:
    """A ControlNet that is zero at birth, made to be heard."""
    for name, parameter in net.named_parameters():
        if "controlnet_" in name and not parameter.any():
            nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():  # what differs between two maps is as loud as the latents
        last, maps = (
            net.controlnet_cond_embedding.conv_out,
            torch.rand(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3),
        )
        made = net.controlnet_cond_embedding(maps)
        last.weight.mul_(1.5 / made.std(0).mean())
        last.bias.sub_(net.controlnet_cond_embedding(maps).mean((0, 2, 3)))
    return net


def make_image_encoder(folder: Path) -> str:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    CLIPVisionModelWithProjection(config).eval().save_pretrained(
        folder / "image_encoder", safe_serialization=True
    )
    return str(folder / "image_encoder")


def make_safety_checker(folder: Path, pictures: list[Pixels]) -> str:
    """Of random weights, in diffusers' format; its threshold lies so that it calls half of these pictures
    unsafe."""
    torch.manual_seed(4)
    vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        projection_dim=16, vision_config=vision, text_config={"hidden_size": WIDTH, "num_hidden_layers": 1}
    )
    checker = _loud(StableDiffusionSafetyChecker(config).eval(), 3.0)
    values = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(
        [Image.fromarray(one) for one in pictures], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        torch.nn.init.normal_(checker.concept_embeds)
        embeds = nn.functional.normalize(checker.visual_projection(checker.vision_model(values)[1]))
        checker.concept_embeds_weights[0] = (
            embeds @ nn.functional.normalize(checker.concept_embeds[:1]).T
        ).median() + 1e-5
    checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
    return str(folder / "safety_checker")


def make_face_adapter(folder: Path, base: str) -> dict[str, str]:
    """A FaceID adapter: its projection reads a face's embedding. -> the `model:` keys."""
    plain = make_ip_adapter(folder, base)
    weights = {
        name: value
        for name, value in load_file(Path(plain["ip_adapter"]) / plain["ip_adapter_weight_name"]).items()
        if name.startswith("ip_adapter.")
    }
    published = {"ff.net.0.proj": "proj.0", "ff.net.2": "proj.2"}
    for name, value in IPAdapterFaceIDImageProjection(512, WIDTH, 2, 4).state_dict().items():
        known = next((part for part in published if part in name), "")
        weights[f"image_proj.{name.replace(known, published[known]) if known else name}"] = value
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "face.safetensors")
    return {"ip_adapter": str(folder), "ip_adapter_weight_name": "face.safetensors"}


def make_ip_adapter(
    folder: Path, base: str, plus: bool = False, xl: bool = False, std: float = 1.0
) -> dict[str, str]:
    """Write an IP-Adapter of random weights, and return its `model:` keys. std: of its layers' weights."""
    torch.manual_seed(3)
    width = 2 * WIDTH if xl else WIDTH
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    projection: nn.Module = (
        IPAdapterPlusImageProjection(
            VISION, width, hidden_dims=64, depth=4, dim_head=64, heads=1, num_queries=6
        )
        if plus
        else ImageProjection(WIDTH, width, 4)
    )
    return save_ip_adapter(folder / ("plus" if plus else "plain"), unet, projection, width, std)


def save_ip_adapter(
    folder: Path, unet: Any, projection: nn.Module, width: int, std: float = 1.0
) -> dict[str, str]:
    """Write an IP-Adapter in the published files' own keys, image_proj.* and ip_adapter.N.to_k_ip.weight, and
    return its `model:` keys. std: of the layers' random weights."""
    weights: dict[str, torch.Tensor] = {}
    if isinstance(projection, IPAdapterPlusImageProjection):
        for name, value in _fused(projection.state_dict()).items():
            weights[f"image_proj.{_published(name)}"] = value
    else:
        for name, value in projection.state_dict().items():
            weights[f"image_proj.{name.replace('image_embeds', 'proj')}"] = value
    # Numbered 1, 3, 5, ...: the published files count the self-attentions too.
    for number, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(inner, width) * std
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "adapter.safetensors")
    return {"ip_adapter": str(folder), "ip_adapter_weight_name": "adapter.safetensors"}


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys and values of a layer in one matrix, as the published files have them."""
    fused = {
        name: value for name, value in state.items() if not name.endswith(("to_k.weight", "to_v.weight"))
    }
    for name, value in state.items():
        if name.endswith("to_k.weight"):
            fused[name.replace("to_k", "to_kv")] = torch.cat([value, state[name.replace("to_k", "to_v")]])
    return fused


def _published(name: str) -> str:
    """diffusers' name of a parameter of the Plus projection -> the published one."""
    for ours, theirs in (
        ("ln0", "0.norm1"),
        ("ln1", "0.norm2"),
        ("attn.to_out.0", "0.to_out"),
        ("attn.to_", "0.to_"),
        ("ff.0.", "1.0."),
        ("ff.1.net.0.proj", "1.1"),
        ("ff.1.net.2", "1.3"),
    ):
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def _loud(module: Any, factor: float, only: str = "") -> Any:
    """Random weights hardly say anything: made louder, so that each input moves the picture."""
    for name, parameter in module.named_parameters():
        if only in name and parameter.ndim == 2:
            parameter.mul_(factor)
    return module
