"""Make a small FLUX.2 [klein] of the real classes with random weights, saved as diffusers saves one, and run
diffusers' own pipeline on one row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from context_diffusion.core.records import Pixels

LATENT_CHANNELS = 4  # of the VAE; the transformer reads patches of 2x2
LATENT_STD = 0.1  # of the VAE, before `bn`: so small that its eps of 1e-4 counts
IMAGE_STD = 0.4  # of decoded noise, in -1 to 1
TEXT_WIDTH = 16  # of one layer's states; the transformer reads those of three
END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<think>", "</think>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def save_tiny_klein(folder: Path, distilled: bool = True, seed: int = 0) -> Path:
    """Save a pipeline in `folder`, in float32 and safetensors, and return the folder. The distilled and the
    base variant of one seed have the same weights: they differ by `is_distilled` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipe = Flux2KleinPipeline(
            scheduler=_scheduler(),
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=_transformer(),
            is_distilled=distilled,
        )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def klein_reference(
    pipe: Flux2KleinPipeline,
    images: list[Image.Image],
    prompt: str,
    *,
    seed: int,
    steps: int,
    guidance: float = 1.0,
    width: int | None = None,
    height: int | None = None,
) -> tuple[Pixels, torch.Tensor]:
    """Make one row alone by diffusers' own pipeline, with noise from a CPU generator of this seed. Without a
    width and height the output has the first image's size; `images` may be empty.

    Returns the pixels, uint8 [H, W, 3], as diffusers rounds them, and the final latents [1, C, H/16, W/16]:
    the packed ones that `callback_on_step_end` is given last, unpacked, not yet de-normalised by `vae.bn`."""
    packed: list[torch.Tensor] = []

    def keep_latents(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        packed.append(tensors["latents"])
        return tensors

    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        image=images or None,
        prompt=prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep_latents,
    )
    pixels = np.array(output.images[0])
    rows, columns = pixels.shape[0] // 16, pixels.shape[1] // 16
    latents = packed[-1].transpose(1, 2).unflatten(2, (rows, columns))  # [1, h w, C] -> [1, C, h, w]
    return pixels, latents


def tiny_images(count: int, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Draw images that are easily told apart: a gradient of two colours with three shapes on it. `sizes` are
    (width, height), taken in turn. Image n depends on the seed, n and its size alone."""
    return [
        _draw_image(np.random.default_rng((seed, number)), sizes[number % len(sizes)])
        for number in range(count)
    ]


def _draw_image(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    first, second = rng.integers(0, 256, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    share = (np.cos(angle) * x + np.sin(angle) * y + 1.5) / 3  # of the second colour, 0 to 1
    gradient = first + share[..., None] * (second - first)
    image = Image.fromarray(gradient.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        left, top = rng.uniform(0, 0.7, 2) * size
        right, bottom = (left, top) + rng.uniform(0.2, 0.5, 2) * size
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        shape((left, top, right, bottom), fill=colour)
    return image


def _tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level BPE without merges, one token a byte: a prompt of 400 ASCII letters fits in 512."""
    words = [*sorted(ByteLevel.alphabet()), *SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """Make a Qwen3 of 28 narrow layers: the pipeline reads the states after 9, 18 and 27."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.25,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def _transformer() -> Flux2Transformer2DModel:
    """Make a transformer louder than at birth, when another reference would hardly move the image. Louder
    still, rounding errors would show: here a relative 1e-6 after the first step moves the latents by 2e-5."""
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            parameter.mul_(2.5)
        elif "norm" in name:  # of queries and keys: sharper attention, so that a few tokens of 512 count
            parameter.mul_(1.5 + torch.rand_like(parameter))  # and no two of them are the same
    return transformer.eval()


@torch.no_grad()
def _vae() -> AutoencoderKLFlux2:
    """Make a VAE whose `bn` is near the statistics of drawn images' latents, and whose decoder fills the
    range of pixels, a few percent of them clipped."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
    ).eval()
    drawn = np.stack([np.asarray(image) for image in tiny_images(8, [(96, 64)], seed=1)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1  # [B, 3, H, W]
    scale = LATENT_STD / vae.encode(images).latent_dist.mode().std()
    for parameter in vae.quant_conv.parameters():
        parameter.mul_(scale)
    vae.post_quant_conv.weight.div_(LATENT_STD)
    latents = vae.encode(images).latent_dist.mode()
    patches = torch.nn.functional.pixel_unshuffle(latents, 2)  # [B, 4 C, H/16, W/16]
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)) + 0.3 * LATENT_STD * torch.randn(patches.shape[1]))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)) * (0.5 + torch.rand(patches.shape[1])))
    noise = LATENT_STD * torch.randn_like(latents)
    decoded = vae.decode(noise).sample
    vae.decoder.conv_out.weight.mul_(IMAGE_STD / decoded.std((0, 2, 3))[:, None, None, None])
    vae.decoder.conv_out.bias.sub_(vae.decode(noise).sample.mean((0, 2, 3)))
    return vae


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make the scheduler with the published configuration."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )
