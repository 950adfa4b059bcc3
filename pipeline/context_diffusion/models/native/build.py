"""A native model with fresh weights, by the sizes of a train job."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from context_diffusion.core.training_job import SMALL, Architecture, Normalization
from context_diffusion.models.context_encoders import make_encoder
from context_diffusion.models.native.draft import CHANNELS
from context_diffusion.models.native.fusion import ContextFusion
from context_diffusion.models.native.look_memory import LookMemory
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.texture_separation import ReliefModel
from context_diffusion.models.normalization import STATISTICS

# Latents of 16 channels show a region's colour through much noise: with a cosine schedule it is decided in
# the first
# twentieth of the steps, and contexts had little effect. The linear schedule of Ho et al. 2020 is far
# noisier.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def build(sizes: Architecture, vocabulary: list[str]) -> NativeModel:
    """Build a model with fresh weights.

    vocabulary: the words that the tokenizer knows; others become [UNK]. Raises ModelError for a context
    encoder that cannot be loaded."""
    # A seed's weights are drawn in the order in which the parts are built here.
    unet = build_unet(sizes)
    controlnet = build_controlnet(sizes)
    tokenizer = build_tokenizer(vocabulary, sizes.text_length)
    vae = build_vae(sizes)
    encoder = make_encoder(sizes)
    text_encoder = build_text_encoder(sizes, len(tokenizer))
    normalization = _normalization(sizes)
    statistics = STATISTICS if normalization.statistics == "token" else 0
    return NativeModel(
        vae=vae,
        unet=unet,
        controlnet=controlnet,
        image_encoder=encoder.model,
        text_encoder=text_encoder,
        fusion=ContextFusion(sizes.width, encoder.model.config.hidden_size, sizes.context_grid, statistics),
        memory=LookMemory(len(tokenizer), side=min(sizes.image_size, 128)),
        relief=ReliefModel(),
        tokenizer=tokenizer,
        scheduler_config=dict(SCHEDULER),
        image_size=sizes.image_size,
        context_encoder=sizes.context_encoder,
        context_size=encoder.size,
        context_mean=encoder.mean,
        context_std=encoder.std,
        context_slots=sizes.context_slots,
        noise_scale=sizes.noise_scale,
        rest_scale=sizes.rest_scale,
        detail_scale=sizes.detail_scale,
        normalization=normalization,
    )


def _normalization(sizes: Architecture) -> Normalization:
    """Return the job's normalisation, its default for contexts resolved: by channel for the small encoder
    alone."""
    if sizes.normalization.contexts is not None:
        return sizes.normalization
    kind = "channel" if sizes.context_encoder == SMALL else "none"
    return sizes.normalization.model_copy(update={"contexts": kind})


def build_vae(sizes: Architecture) -> AutoencoderTiny:
    blocks = (0, 0, 1, 3) if sizes.latent_factor == 8 else (0, 1, 3)
    return AutoencoderTiny(
        encoder_block_out_channels=(sizes.vae_width,) * len(blocks),
        decoder_block_out_channels=(sizes.vae_width,) * len(blocks),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        latent_channels=sizes.latent_channels,
    )


def build_text_encoder(sizes: Architecture, words: int) -> CLIPTextModel:
    """Build a CLIP text encoder with fresh weights. words: the tokenizer's vocabulary size."""
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=sizes.attention_heads,
        max_position_embeddings=sizes.text_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def _attention(sizes: Architecture) -> dict[str, int]:
    # What diffusers calls attention_head_dim is the number of heads (its issue 2011).
    return {
        "cross_attention_dim": sizes.width,
        "attention_head_dim": sizes.attention_heads,
        "norm_num_groups": 16,
    }


def build_unet(sizes: Architecture) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sizes.image_size // sizes.place,
        in_channels=sizes.folded_channels + sizes.draft * (sizes.folded_channels + CHANNELS * sizes.place**2),
        out_channels=sizes.folded_channels,
        **_attention(sizes),
        block_out_channels=tuple(sizes.channels),
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in sizes.attention
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(sizes.attention)
        ),
        layers_per_block=sizes.layers_per_block,
        class_embed_type="projection",  # of NativeModel.pool
        projection_class_embeddings_input_dim=2 * sizes.width,
        resnet_time_scale_shift="scale_shift",
    )


def build_controlnet(sizes: Architecture) -> ControlNetModel:
    controlnet = ControlNetModel(
        in_channels=sizes.folded_channels,
        **_attention(sizes),
        block_out_channels=tuple(sizes.channels),
        down_block_types=("DownBlock2D",) * len(sizes.channels),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=sizes.layers_per_block,
        conditioning_channels=sizes.folded_channels,  # NativeModel.encode_control gives latents
        conditioning_embedding_out_channels=(2 * sizes.channels[0],),
    )
    _start_off_zero(controlnet)
    return controlnet


def _start_off_zero(controlnet: ControlNetModel) -> None:
    """Start the zero convolutions a little off zero, so that the layout is learned together with the
    colours."""
    for zero in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        nn.init.normal_(zero.weight, std=0.02)
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.05)


def build_tokenizer(vocabulary: list[str], length: int) -> PreTrainedTokenizerFast:
    """Build a lower-casing word tokenizer in the standard format."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *sorted(set(vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=length,
    )
