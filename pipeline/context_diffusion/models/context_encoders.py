"""The context encoder: a vision tower of CLIP, SigLIP or DINOv2, by folder or hub id, or the small one that
is trained along.

The only place that knows how they differ. N images  S pixels a side  P patches  D_v width
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from context_diffusion.core.errors import ModelError
from context_diffusion.core.training_job import SMALL, Architecture
from context_diffusion.inputs.context_images import CLIP_MEAN, CLIP_STD

# By the config's model_type: the vision tower's class, and the pixels' mean and std where no
# preprocessor_config.json
# says so. A full CLIP or SigLIP checkpoint gives its vision tower.
_CLIP = (CLIPVisionModel, list(CLIP_MEAN), list(CLIP_STD))
_SIGLIP = (SiglipVisionModel, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
ENCODERS: dict[str, tuple[Any, list[float], list[float]]] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": (Dinov2Model, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (Dinov2WithRegistersModel, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


@dataclass(frozen=True)
class ContextEncoder:
    """A vision tower. model: of a class of ENCODERS; size: pixels a side of its input; mean, std: of its
    pixels in [0, 1]."""

    model: Any
    size: int
    mean: list[float]
    std: list[float]


def make_encoder(sizes: Architecture) -> ContextEncoder:
    """Build the encoder that architecture.context_encoder names: small with fresh weights, or pretrained and
    frozen."""
    if sizes.context_encoder != SMALL:
        return load_encoder(sizes.context_encoder)
    config = CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=sizes.attention_heads,
        image_size=sizes.image_size,
        patch_size=sizes.context_patch,
    )
    return ContextEncoder(CLIPVisionModel(config), sizes.image_size, list(CLIP_MEAN), list(CLIP_STD))


def load_encoder(name: str) -> ContextEncoder:
    """Load a pretrained encoder, frozen, with the mean and std of its preprocessor. Raises ModelError."""
    model = load_vision_model(name).requires_grad_(False).eval()
    _, mean, std = ENCODERS[model.config.model_type]
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError:  # a bare model, such as IP-Adapter's image_encoder/
        processor = {}
    size = model.config.image_size
    # DINOv2 interpolates its positions: it was trained at 518 pixels, its preprocessor crops to 224.
    if model.config.model_type.startswith("dinov2") and "crop_size" in processor:
        size = processor["crop_size"]["height"]
    return ContextEncoder(
        model, size, list(processor.get("image_mean", mean)), list(processor.get("image_std", std))
    )


def load_vision_model(name: str | Path) -> Any:
    """Load the vision tower of a folder or hub id, of the class that its config names; safetensors, no remote
    code.

    Raises ModelError for an unknown kind of model or missing weights."""
    known = f"`{SMALL}`, or a folder or hub id of CLIP, SigLIP or DINOv2 (model_type {', '.join(ENCODERS)})"
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"context encoder {str(name)!r} has no readable config ({reason}); expected one of {known}"
        ) from error
    if kind not in ENCODERS:
        raise ModelError(
            f"context encoder {str(name)!r} has the unknown model_type {kind!r}; expected one of {known}"
        )
    component = ENCODERS[kind][0]
    try:
        model, info = component.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"context encoder {str(name)!r} cannot be loaded as {component.__name__}: {error}"
        ) from error
    if info["missing_keys"]:  # transformers would use random ones
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"context encoder {str(name)!r}: {len(missing)} weights of {component.__name__} are missing: "
            f"{missing[:3]}"
        )
    return model


def patch_tokens(model: Any, values: Tensor) -> Tensor:
    """Encode normalised pixels (N, 3, S, S) to the tokens of the patches (N, P, D_v), row by row.

    The tokens before the patches are dropped: a class token (CLIP, DINOv2; SigLIP has none), DINOv2's
    registers. S need be neither the size that DINOv2 was trained at nor a multiple of the patch size: a
    remaining border is not encoded."""
    patches = (values.shape[2] // model.config.patch_size) * (values.shape[3] // model.config.patch_size)
    return model(pixel_values=values).last_hidden_state[:, -patches:]
