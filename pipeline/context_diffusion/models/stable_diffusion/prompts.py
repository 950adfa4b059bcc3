"""Prompts of Stable Diffusion, encoded by diffusers' own pipeline; longer ones in chunks.

T text tokens  D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from context_diffusion.models.conditioning import TOKENIZING, tokenize


class PromptEncoder:
    """Encode prompts. chunks: how many times the text encoder's length a prompt may have; the rest is
    truncated."""

    def __init__(self, pipe: Any, xl: bool, clip_skip: int | None, chunks: int) -> None:
        self.pipe = pipe
        self.xl = xl
        self.clip_skip = clip_skip
        self.chunks = chunks
        self.tokenizers = [pipe.tokenizer, pipe.tokenizer_2] if xl else [pipe.tokenizer]
        self.length = min(tokenizer.model_max_length for tokenizer in self.tokenizers)
        self.zeros = xl and bool(pipe.config.force_zeros_for_empty_prompt)

    def key(self, prompt: str | None, negative: bool) -> str:
        """Return a key of the embeddings: equal keys, equal embeddings.

        None is no text: zeros for an XL model that is configured so, else the same as a negative prompt of
        "". A prompt of "" is a text, with clip_skip."""
        if prompt is None:
            return "none" if self.zeros else "text:"
        skipped = f"skip {self.clip_skip}:" if self.clip_skip and not negative else ""
        return f"{skipped}text:{prompt}"

    def tokens(self, text: str) -> int:
        """Count the tokens, with begin and end, by the tokenizer that needs most."""
        return max(len(tokenize(part, text, verbose=False)["input_ids"]) for part in self.tokenizers)

    def truncates(self, prompt: str | None) -> bool:
        return (
            len(self.split(prompt or "")) > self.chunks
            if self.chunks > 1
            else self.tokens(prompt or "") > self.length
        )

    def split(self, prompt: str) -> list[str]:
        """Split a prompt at spaces into parts that the text encoder can read."""
        parts: list[str] = []
        for word in prompt.split(" "):
            if parts and self.tokens(f"{parts[-1]} {word}") <= self.length:
                parts[-1] += f" {word}"
            else:
                parts.append(word)
        return parts

    def __call__(self, prompt: str | None, negative: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode to hidden states (1, chunks·T, D), pooled (1, D') for XL, and a mask (1, chunks·T) bool."""
        if self.chunks == 1:
            hidden, pooled = self._encode(prompt, negative)
            return hidden, pooled, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        parts = self.split(prompt or "")[: self.chunks] if prompt else [prompt]
        encoded = [self._encode(part, negative) for part in parts]
        hidden = torch.cat([states for states, _ in encoded], 1)
        mask = torch.zeros(1, self.chunks * self.length, dtype=torch.bool, device=hidden.device)
        mask[:, : hidden.shape[1]] = True
        padded = hidden.new_zeros(1, mask.shape[1], hidden.shape[2])
        padded[:, : hidden.shape[1]] = hidden
        return padded, encoded[0][1], mask

    def _encode(self, text: str | None, negative: bool) -> tuple[Tensor, Tensor | None]:
        with TOKENIZING:  # the pipeline tokenizes in it
            return self._by_pipeline(text, negative)

    def _by_pipeline(self, text: str | None, negative: bool) -> tuple[Tensor, Tensor | None]:
        """Encode as the prompt of a pipeline without guidance; a negative one as diffusers does, without
        clip_skip."""
        zeros = self.zeros and text is None
        skip = None if negative or text is None else self.clip_skip
        options = {
            "device": self.pipe.unet.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        if not self.xl and skip:
            return self._skipped(text or "", skip), None
        if not self.xl:
            return self.pipe.encode_prompt(text or "", **options)[0], None
        hidden, _, pooled, _ = self.pipe.encode_prompt(text or "", **options, clip_skip=skip)
        return (torch.zeros_like(hidden), torch.zeros_like(pooled)) if zeros else (hidden, pooled)

    def _skipped(self, text: str, skip: int) -> Tensor:
        """Encode without the text encoder's last layers. (diffusers 0.42 cannot: it looks for them at a path
        of transformers 4.)"""
        encoder = self.pipe.text_encoder
        ids = self.pipe.tokenizer(
            text, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        hidden = encoder(ids["input_ids"].to(encoder.device), output_hidden_states=True).hidden_states[
            -(skip + 1)
        ]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
