"""Prompts of FLUX.2 [klein]: the role prompt that names the references, and its hidden states in Qwen3.

L tokens  D width of the text encoder
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from context_diffusion.core.errors import ModelError
from context_diffusion.models.conditioning import tokenize
from context_diffusion.models.flux2.offloading import Offloaded

LENGTH = 512  # tokens, to which every prompt is padded or truncated
LAYERS = (9, 18, 27)  # whose outputs the transformer reads, side by side


def full_prompt(template: str, prompt: str | None, references: int) -> str:
    """Return the text that the model reads: the template with the prompt and the contexts' numbers, or
    without contexts the prompt alone. The query is image 1.

    references: with the query."""
    text = prompt or ""
    if references < 2:
        return text
    styles = "image 2" if references == 2 else f"images 2 to {references}"
    return template.format(prompt=text, styles=styles).strip()


class PromptEncoder:
    """Encodes prompts as diffusers' Flux2KleinPipeline does."""

    def __init__(self, tokenizer: Any, encoder: Any, base: str, offloaded: Offloaded | None) -> None:
        """encoder: of transformers, without what follows its last layer that is read. base: for messages.
        Raises ModelError for a tokenizer of another kind."""
        if not tokenizer.chat_template:
            raise ModelError(
                f"model: the tokenizer of {base} has no chat template: download its tokenizer/ again"
            )
        self.tokenizer, self.encoder, self.offloaded = tokenizer, encoder, offloaded

    def truncates(self, prompt: str) -> bool:
        """Return whether a prompt has more tokens than are read."""
        return len(tokenize(self.tokenizer, self._chat(prompt))["input_ids"]) > LENGTH

    def __call__(self, prompt: str) -> Tensor:
        """Encode a prompt to (1, L, 3·D)."""
        options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
        read = tokenize(self.tokenizer, self._chat(prompt), return_tensors="pt", **options)
        with self.offloaded.in_use() if self.offloaded else nullcontext():
            device = self.encoder.embed_tokens.weight.device
            states = self.encoder(
                input_ids=read["input_ids"].to(device),
                attention_mask=read["attention_mask"].to(device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], 2)

    def _chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )
