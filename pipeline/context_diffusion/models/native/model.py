"""The native model: components of diffusers and transformers, and a small fusion module.

The query's control map goes through a ControlNet without cross-attention, contexts and prompt through
cross-attention of the U-Net (after arXiv 2312.03584, with masked and normalised fusion, a null context and
dropout added). Every method treats its samples one by one.

B samples  N images  T text tokens  K tokens a context  L all tokens  D width  C h w latents  H W pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel

from context_diffusion.core.training_job import SMALL, Normalization
from context_diffusion.inputs.context_images import CLIP_MEAN, CLIP_STD
from context_diffusion.models.conditioning import tokenize
from context_diffusion.models.context_encoders import patch_tokens
from context_diffusion.models.native import checkpoint
from context_diffusion.models.native.draft import TEXTURED, Layout, Look, layout_of, look_of, shows_tones
from context_diffusion.models.native.fusion import ContextFusion
from context_diffusion.models.native.look_memory import LookMemory
from context_diffusion.models.native.preconditioning import EncodedDraft, levels, precondition
from context_diffusion.models.native.texture_separation import ReliefModel
from context_diffusion.models.normalization import describe, normalise, resized, restore

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass
class NativeModel:
    """The components of a native model and their computations; NativeBackbone serves them to the engine."""

    vae: AutoencoderTiny
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    image_encoder: Any  # of a class of context_encoders.ENCODERS
    text_encoder: CLIPTextModel
    fusion: ContextFusion
    memory: LookMemory
    relief: ReliefModel
    tokenizer: Any  # a PreTrainedTokenizerFast
    scheduler_config: dict[str, Any]
    image_size: int = 128
    context_encoder: str = SMALL  # folder or hub id of image_encoder; all but the small one stay frozen
    context_size: int = 128
    # Of pixels in [0, 1], for contexts that are not normalised by their own statistics.
    context_mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    context_std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    context_slots: int = 8
    noise_scale: float = 1.0
    # factor of what the U-Net adds to a draft: a barely trained one blurs more than it improves
    rest_scale: float = 1.0
    # share of the draft's own pixels in the image: models/native/draft_image.py
    detail_scale: float = 1.0
    normalization: Normalization = field(default_factory=lambda: Normalization(contexts="channel"))

    MODULES: ClassVar[dict[str, Any]] = {
        "vae": AutoencoderTiny,
        "unet": UNet2DConditionModel,
        "controlnet": ControlNetModel,
        "image_encoder": None,  # its config says which
        "text_encoder": CLIPTextModel,
        "fusion": ContextFusion,
        "memory": LookMemory,
        "relief": ReliefModel,
    }

    @property
    def modules(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.MODULES}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.encoder_block_out_channels) - 1) * self.fold
        side = self.image_size // factor
        return (self.unet.config.out_channels, side, side)

    @property
    def fold(self) -> int:
        """Side, in latents of the autoencoder, of one place of the U-Net's grid."""
        return math.isqrt(self.unet.config.out_channels // self.vae.config.latent_channels)

    @property
    def drafts(self) -> bool:
        """Whether the U-Net takes a draft beside the latents: models/native/draft.py."""
        return bool(self.unet.config.in_channels > self.unet.config.out_channels)

    @property
    def latent_scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        for module in self.modules.values():
            module.to(device=device, dtype=dtype)
        self.__dict__.pop("_alphas", None)  # it lies on the device
        return self

    def eval(self) -> Self:
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        return self.unet.conv_out.weight.device  # diffusers' own property goes through all weights: 1.4 ms

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_out.weight.dtype

    def encode_text(self, prompts: list[str | None]) -> tuple[Tensor, Tensor]:
        """Return tokens (B, T, D) and their mask (B, T) bool. Longer prompts are truncated."""
        length = self.text_encoder.config.max_position_embeddings
        batch = tokenize(
            self.tokenizer,
            [prompt or "" for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"].bool()
        hidden = self.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return hidden.last_hidden_state, mask

    def known_words(self, prompts: list[str | None]) -> Tensor:
        """Return (B, V): 1 for each word of the vocabulary that the prompt contains, in any order."""
        length, special = self.text_encoder.config.max_position_embeddings, self.tokenizer.all_special_ids
        words = torch.zeros(len(prompts), len(self.tokenizer), device=self.device)
        for row, prompt in enumerate(prompts):
            words[row, tokenize(self.tokenizer, prompt or "")["input_ids"][:length]] = 1
        words[:, special] = 0
        return words

    def truncates(self, prompt: str | None) -> bool:
        """Return whether a prompt has more tokens than the text encoder reads."""
        length = self.text_encoder.config.max_position_embeddings
        return len(tokenize(self.tokenizer, prompt or "")["input_ids"]) > length

    def summarise_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Summarise uint8 (N, 3, S, S) as (N, K, 2·D_v), and return the images' statistics too."""
        kind = self.normalization.contexts or "none"
        values, _, _ = normalise(images, kind)
        if kind == "none":
            centre, scale = (
                values.new_tensor(part)[:, None, None] for part in (self.context_mean, self.context_std)
            )
            values = (values - centre) / scale
        statistics = describe(images)[:, : self.fusion.config.statistics]
        return self.fusion.summarise(patch_tokens(self.image_encoder, values.to(self.dtype))), statistics

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode contexts, uint8 (N, 3, S, S), to tokens (N, K, D)."""
        return self.fusion.encode(*self.summarise_images(images))

    def fuse(
        self, text: Tensor, text_mask: Tensor, contexts: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.fusion(text, text_mask, contexts, weights)

    def encode_control(self, control_maps: Tensor, kinds: list[str]) -> Tensor:
        """Encode control maps, uint8 (B, 3, H, W), to latents (B, C, h, w), once a row.

        Maps that show tones are normalised first; tanh keeps the order of outliers."""
        normal, _, _ = normalise(control_maps, self.normalization.query)
        tones = shows_tones(kinds, control_maps.device)[:, None, None, None]
        signed = torch.where(tones, torch.tanh(0.7 * normal), control_maps.float() / 127.5 - 1)
        return self._encode(signed)

    def control(self, latents: Tensor, timesteps: Tensor, encoded: Tensor) -> tuple[list[Tensor], Tensor]:
        down, mid = self.controlnet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=None,
            controlnet_cond=encoded.to(self.dtype),
            return_dict=False,
        )
        return list(down), mid

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        bias: Tensor,
        down: list[Tensor] | None,
        mid: Tensor | None,
        draft: EncodedDraft | None = None,
    ) -> Tensor:
        # The U-Net takes a mask m and adds (1 - m) · -10000; this is solved for m.
        mask = 1 + bias[:, 0] / 10_000
        given, gain, known = self.precondition(latents, timesteps, draft)
        output = self.unet(
            given,
            timesteps,
            hidden.to(self.dtype),
            class_labels=self.pool(hidden, bias).to(self.dtype),
            encoder_attention_mask=mask,
            down_block_additional_residuals=None if down is None else tuple(down),
            mid_block_additional_residual=mid,
        ).sample
        return gain * output + known

    def look(self, images: Tensor) -> Look:
        """Measure what drafts need of contexts, uint8 (N, 3, S, S)."""
        return look_of(images, self.image_size, self._texture_of)

    def layout(self, control_maps: Tensor, kinds: list[str]) -> Layout:
        """Measure what drafts need of queries, uint8 (N, 3, H, W)."""
        return layout_of(control_maps, kinds, self._texture_of, self.image_size)

    def context_pixels(self, images: Tensor) -> Tensor:
        """Resize contexts, uint8 (N, 3, S, S), to `context_size`, on the model's device."""
        pixels = resized(images.to(self.device).float(), self.context_size)
        return pixels.round().clamp(0, 255).to(torch.uint8)

    @property
    def _texture_of(self) -> Callable[[Tensor], Tensor] | None:
        return self.relief.texture if self.relief.learned else None

    def encode_draft(self, drafts: Tensor) -> EncodedDraft:
        """Encode drafts (B, CHANNELS, H, W) for the U-Net: folded pixels, latents of textures or 0."""
        present = drafts.flatten(1).any(1)[:, None, None, None]
        latents = self._encode(drafts[:, TEXTURED]) * present
        return EncodedDraft(F.pixel_unshuffle(drafts, drafts.shape[-1] // latents.shape[-1]), latents)

    def precondition(
        self, latents: Tensor, timesteps: Tensor, draft: EncodedDraft | None, rest_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return the U-Net's input, and gain and offset with v = gain · output + offset."""
        latents = latents.to(self.dtype)
        if not self.drafts:
            return latents, 1.0, 0.0
        if draft is None:
            return F.pad(latents, (0, 0, 0, 0, 0, self.unet.config.in_channels - latents.shape[1])), 1.0, 0.0
        return precondition(latents, draft, *levels(self._alphas, timesteps), rest_scale)

    @cached_property
    def _alphas(self) -> Tensor:
        return DDIMScheduler.from_config(self.scheduler_config).alphas_cumprod.to(self.device)

    def pool(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Pool tokens (B, L, D) to (B, 2·D): the weighted means of the text's and of the contexts' tokens.

        They modulate every residual block, as a style does in AdaIN (Huang and Belongie 2017): colour at all
        resolutions."""
        text = self.text_encoder.config.max_position_embeddings
        cut = (text, hidden.shape[1] - text)
        shares = [part.softmax(2).to(hidden.dtype) for part in bias.split(cut, 2)]
        return torch.cat(
            [(share @ part)[:, 0] for share, part in zip(shares, hidden.split(cut, 1), strict=True)], 1
        )

    def encode_pixels(self, images: Tensor) -> Tensor:
        """Encode uint8 (B, 3, H, W) to latents (B, C, h, w) of about unit std."""
        return self._encode(images / 127.5 - 1)

    def _encode(self, signed: Tensor) -> Tensor:
        """Encode values in [-1, 1]; `fold` x `fold` latents become channels of one position of the U-Net."""
        return (
            F.pixel_unshuffle(self.vae.encode(signed.to(self.dtype)).latents, self.fold) * self.latent_scale
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) in [0, 1]."""
        sample = self.vae.decode(
            F.pixel_shuffle(latents.to(self.dtype) / self.latent_scale, self.fold)
        ).sample
        return (sample / 2 + 0.5).clamp(0, 1)

    @property
    def restores(self) -> bool:
        return self.normalization.statistics == "restored"

    def restore(self, images: Tensor, contexts: Tensor, weights: Tensor) -> Tensor:
        return restore(images, contexts, weights)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a folder per component and model_index.json, safetensors in `dtype`."""
        checkpoint.save(self, Path(folder), dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> NativeModel:
        """Load what save_pretrained wrote, in float32. Raises ModelError naming a missing part."""
        return cls(**checkpoint.load(Path(folder), cls.MODULES)).eval()
