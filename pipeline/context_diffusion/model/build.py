"""A native model with fresh weights, by the sizes of a train job."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from context_diffusion.model.fusion import ContextFusion
from context_diffusion.model.native import NativeModel
from context_diffusion.training.config import Architecture

# Latents of 16 channels tell a region's colour through much noise: with a cosine schedule it is decided in the first
# twentieth of the steps, and the contexts were hardly heeded. The linear one of Ho et al. 2020 is far noisier.
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
    """vocabulary: the words that the tokenizer knows; others become [UNK]."""
    first, last = sizes.channels[0], sizes.channels[-1]
    latent = {"sample_size": sizes.image_size // 8, "in_channels": sizes.latent_channels}
    attention = {"cross_attention_dim": sizes.width, "attention_head_dim": 4, "norm_num_groups": 16}
    unet = UNet2DConditionModel(
        **latent,
        **attention,
        out_channels=sizes.latent_channels,
        block_out_channels=(first, last),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        class_embed_type="projection",  # of NativeModel.pool
        projection_class_embeddings_input_dim=2 * sizes.width,
        resnet_time_scale_shift="scale_shift",
    )
    controlnet = ControlNetModel(
        in_channels=sizes.latent_channels,
        **attention,
        block_out_channels=(first, last),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        conditioning_channels=sizes.latent_channels,  # NativeModel.encode_control gives latents
        conditioning_embedding_out_channels=(2 * first,),
    )
    _let_the_layout_in(controlnet)
    tokenizer = build_tokenizer(vocabulary, sizes.text_length)
    return NativeModel(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(sizes.vae_width,) * 4,
            decoder_block_out_channels=(sizes.vae_width,) * 4,
            num_encoder_blocks=(0, 0, 1, 3),
            num_decoder_blocks=(3, 2, 1, 0),
            latent_channels=sizes.latent_channels,
        ),
        unet=unet,
        controlnet=controlnet,
        image_encoder=CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=sizes.width,
                intermediate_size=3 * sizes.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=sizes.image_size,
                patch_size=sizes.context_patch,
            )
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=sizes.width,
                intermediate_size=2 * sizes.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=sizes.text_length,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        fusion=ContextFusion(sizes.width, sizes.width, sizes.context_grid),
        tokenizer=tokenizer,
        scheduler_config=dict(SCHEDULER),
        image_size=sizes.image_size,
        context_size=sizes.image_size,
        context_slots=sizes.context_slots,
        noise_scale=sizes.noise_scale,
    )


def _let_the_layout_in(controlnet: ControlNetModel) -> None:
    """Zero convolutions start a little off zero, so that the layout is learned together with the colours."""
    for zero in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        nn.init.normal_(zero.weight, std=0.02)
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.05)


def build_tokenizer(vocabulary: list[str], length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer in the standard format."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *sorted(set(vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=length,
    )
