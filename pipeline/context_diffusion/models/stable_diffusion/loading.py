"""Load a pretrained Stable Diffusion (1.x, 2.x, XL) from its parts, by diffusers' own loaders.

Reads safetensors only, runs no remote code. Knows no rows and no steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.event_log import LOG
from context_diffusion.core.model_parts import Parts
from context_diffusion.models.hub import fetch, split
from context_diffusion.models.resolve import read_json
from context_diffusion.models.stable_diffusion.safety_checker import SafetyChecker

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
# IP-Adapters that read images
ADAPTERS = (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)
NAMED = 3  # keys of a LoRA that fit no layer, named in a message
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class StableDiffusion:
    """A loaded model. pipe: diffusers' text-to-image pipeline of the base, with the IP-Adapter in its U-Net;
    xl: an XL one."""

    pipe: Any
    controlnets: list[Any]
    parts: Parts
    xl: bool
    unsafe: SafetyChecker | None = None


def load(parts: Parts, device: torch.device) -> StableDiffusion:
    """Load all parts on the device, in the dtype that the parts name. Raises ModelError naming the part."""
    kind = "bfloat16" if parts.dtype == "auto" and device.type == "cuda" else parts.dtype
    dtype = DTYPES.get(kind, torch.float32)
    variant = parts.variant if dtype != torch.float32 else None
    loader = _Loader(parts, dtype, variant)
    xl = "StableDiffusionXL" in fetch(parts.base, "model_index.json", parts.revision).read_text()
    kind_of_pipe = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    # The safety checker is loaded apart: the pipeline is never called, and XL's takes none.
    components: dict[str, Any] = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    if parts.image_encoder:
        components["image_encoder"] = loader(
            transformers.CLIPVisionModelWithProjection, parts.image_encoder, dtype_name="dtype"
        )
    if parts.vae:
        components["vae"] = loader.component(diffusers.AutoencoderKL, parts.vae)
    pipe = loader(kind_of_pipe, parts.base, **components)
    controlnets = [loader.component(diffusers.ControlNetModel, part) for part in parts.controlnets]
    for name, net in zip(parts.controlnets, controlnets, strict=True):
        if (width := net.config.cross_attention_dim) != pipe.unet.config.cross_attention_dim:
            raise ModelError(
                f"model: controlnet {name} reads text of width {width}, that of base {parts.base} is "
                "different"
            )
    _fuse_loras(pipe, parts)
    if parts.ip_adapter and parts.ip_adapter_weight_name:
        _load_ip_adapter(pipe, parts, fetch(parts.ip_adapter, parts.ip_adapter_weight_name, parts.revision))
    pipe.set_progress_bar_config(disable=True)
    checker = _load_safety_checker(loader, parts.safety_checker) if parts.safety_checker else None
    for module in [*pipe.components.values(), *controlnets, checker]:
        if isinstance(module, nn.Module):
            module.to(device).eval().requires_grad_(False)
    pipe.vae.to(_vae_dtype(dtype, device, upcast=xl and pipe.vae.config.force_upcast))
    return StableDiffusion(pipe, controlnets, parts, xl, SafetyChecker(checker) if checker else None)


def _vae_dtype(dtype: torch.dtype, device: torch.device, upcast: bool) -> torch.dtype:
    """Return the autoencoder's dtype beside networks of a dtype, to encode and decode.

    bfloat16 is noisier than float16 in pixels. upcast: it overflows in float16, as diffusers' XL pipelines
    know too."""
    if dtype == torch.float32 or upcast:
        return torch.float32
    return torch.float16 if device.type == "cuda" else dtype


@dataclass
class _Loader:
    parts: Parts
    dtype: torch.dtype
    variant: str | None

    def component(self, kind: Any, part: str) -> Any:
        """Load one of diffusers' models, checking its class: the loader would fill another model's folder
        with random weights."""
        class_name = read_json(part, "config.json", self.parts.revision).get("_class_name")
        if class_name != kind.__name__:
            raise ModelError(f"model: {part} is a {class_name}, expected a {kind.__name__}")
        return self(kind, part)

    def __call__(self, kind: Any, part: str, dtype_name: str = "torch_dtype", **components: Any) -> Any:
        """Call kind.from_pretrained for a part at its commit; without the variant if the part has none."""
        local = Path(part).exists()
        repo, folder = (part, "") if local else split(part)
        revision = None if local else self.parts.revision.get(repo)
        options = {"revision": revision, "use_safetensors": True, dtype_name: self.dtype}
        options |= {"subfolder": folder} if folder else {}
        problems: list[Exception] = []
        for variant in dict.fromkeys((self.variant, None)):
            try:
                return kind.from_pretrained(
                    repo, **options, **components, **({"variant": variant} if variant else {})
                )
            except Exception as error:  # loaders may raise any exception on bad files
                problems.append(error)
        raise ModelError(f"model: {part} cannot be loaded as {kind.__name__}: {problems[-1]}") from problems[
            -1
        ]


def _load_safety_checker(loader: _Loader, part: str) -> Any:
    checker, info = loader(StableDiffusionSafetyChecker, part, dtype_name="dtype", output_loading_info=True)
    if info["missing_keys"]:  # transformers would use random ones
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"model: safety_checker {part} is not a safety checker: {len(missing)} weights are missing, "
            f"{', '.join(missing[:3])}"
        )
    return checker


def _fuse_loras(pipe: Any, parts: Parts) -> None:
    for number, (name, scale) in enumerate(parts.loras):
        folder, _, file = name.rpartition("/")
        path = fetch(folder or ".", file, parts.revision)
        try:
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"lora{number}")
            _check_lora(pipe, path, f"lora{number}", name, parts.base)
            pipe.fuse_lora(lora_scale=scale, adapter_names=[f"lora{number}"])
            pipe.unload_lora_weights()
        except ModelError:
            raise
        except Exception as error:
            hint = "; pip install 'context-diffusion[lora]'" if "PEFT" in str(error) else ""
            raise ModelError(
                f"model: lora {name} cannot be loaded into {parts.base}: {error}{hint}"
            ) from error


def _check_lora(pipe: Any, path: Path, adapter: str, name: str, base: str) -> None:
    """Raise ModelError for a LoRA that changes nothing, and warn of one that fits in part.

    diffusers ignores keys that fit no layer, even all of them, and reports it only on a log that is muted
    here."""
    layers = [layer for component in pipe.get_list_adapters() for layer in getattr(pipe, component).modules()]
    if not any(
        adapter in getattr(layer, "lora_B", {}) and layer.lora_B[adapter].weight.any() for layer in layers
    ):
        raise ModelError(
            f"model: lora {name} changes no weight of {base}: its keys fit none of its layers; "
            "was it trained for another kind of model, or saved without the prefix unet.?"
        )
    if unused := _unused_keys(path, layers, adapter):
        names = ", ".join(unused[:NAMED]) + (", ..." if unused[NAMED:] else "")
        LOG.warn(
            f"model: lora {name} fits {base} only in part: {len(unused)} of its keys fit no layer: {names}"
        )


def _unused_keys(path: Path, layers: list[nn.Module], adapter: str) -> list[str]:
    """Return the keys of a LoRA's file whose weights are in no layer. Compares weights, since naming schemes
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
    for key, weight in safetensors.torch.load_file(path).items():
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


def _load_ip_adapter(pipe: Any, parts: Parts, path: Path) -> None:
    if pipe.image_encoder is None:
        raise ModelError(
            "model: ip_adapter needs image_encoder, the CLIP vision model that it was trained with"
        )
    try:
        pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    except Exception as error:
        raise ModelError(f"model: ip_adapter {path} does not fit {parts.base}: {error}") from error
    [layer] = pipe.unet.encoder_hid_proj.image_projection_layers
    if not isinstance(layer, ADAPTERS):
        known = ", ".join(kind.__name__ for kind in ADAPTERS)
        raise ModelError(
            f"model: ip_adapter {path.name} is a {type(layer).__name__}, which is not supported; known "
            f"are {known}"
        )
    plain = isinstance(layer, ImageProjection)
    encoder = pipe.image_encoder.config
    width = encoder.projection_dim if plain else encoder.hidden_size
    wanted = (
        layer.image_embeds.in_features
        if plain
        else getattr(getattr(layer, "proj_in", None), "in_features", width)
    )
    if width != wanted:
        features = f"image_encoder {parts.image_encoder} gives {width} features"
        raise ModelError(
            f"model: {features}, ip_adapter {path.name} reads {wanted}: name the encoder that it was "
            "made with"
        )
