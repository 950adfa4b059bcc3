"""What the lanes of a row have in common is made once a row: all of a U-Net or ControlNet before its first cross-attention.

The lanes differ in their prompts and contexts alone, and these enter with cross-attention. Not so where prompts or
contexts modulate the residual blocks too (SDXL, the native model): nothing can be shared there.

B rows or lanes  C h w latents
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Given(nn.Module):
    """A module whose output may be known already: then that is what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.output: Tensor | None = None

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named) if self.output is None else self.output


class SharedStart:
    """The start of a U-Net or ControlNet, in place. name: the prefix of what `make` gives."""

    def __init__(self, net: Any, name: str) -> None:
        self.net, self.name = net, name
        self.given: dict[str, Given] = {}
        if getattr(net, "class_embedding", None) is None and getattr(net, "add_embedding", None) is None:
            self._wrap()

    def _wrap(self) -> None:
        net = self.net
        net.conv_in = self.given[f"{self.name}conv_in"] = Given(net.conv_in)
        for number, (owner, key, module, attention) in enumerate(_until_cross_attention(net)):
            if attention is not None:
                block = attention.transformer_blocks[0]
                block.attn1 = self.given[f"{self.name}attn1"] = Given(block.attn1)
                return
            owner[key] = self.given[f"{self.name}{number}"] = Given(module)

    def make(self, latents: Tensor, timesteps: Tensor, added: Tensor | float = 0.0) -> dict[str, Tensor]:
        """Of rows (B, C, h, w): the outputs of the shared modules, by name. added: to the first features (the control
        map's embedding)."""
        if not self.given:
            return {}
        net, made = self.net, {}
        embedding = net.time_embedding(net.time_proj(timesteps).to(latents.dtype))
        hidden = made[f"{self.name}conv_in"] = net.conv_in(latents)
        hidden = hidden + added
        for number, (owner, key, _, attention) in enumerate(_until_cross_attention(net)):
            if attention is not None:
                block, tokens = attention.transformer_blocks[0], _tokens(attention, hidden)
                made[f"{self.name}attn1"] = block.attn1(block.norm1(tokens))
                return made
            module = owner[key]
            hidden = module(hidden, embedding) if _is_resnet(module) else module(hidden)
            made[f"{self.name}{number}"] = hidden
        return made

    def use(self, outputs: dict[str, Tensor] | None) -> None:
        """What the next calls take as given; None: nothing."""
        for name, module in self.given.items():
            module.output = None if outputs is None else outputs[name]


def _until_cross_attention(net: Any) -> Iterator[tuple[Any, int, Any, Any]]:
    """(list, index, module, None) of each residual block and downsampler in their order; the last one has the transformer
    in place of None."""
    for block in net.down_blocks:
        for number, resnet in enumerate(block.resnets):
            yield block.resnets, number, resnet, None
            if getattr(block, "has_cross_attention", False):
                yield block.attentions, number, None, block.attentions[number]
                return
        for number, sampler in enumerate(block.downsamplers or []):
            yield block.downsamplers, number, sampler, None


def _is_resnet(module: Any) -> bool:
    inner = module.module if isinstance(module, Given) else module
    return hasattr(inner, "time_emb_proj")


def _tokens(attention: Any, hidden: Tensor) -> Tensor:
    """As Transformer2DModel makes them: (B, C, h, w) -> (B, h·w, C)."""
    hidden = attention.norm(hidden)
    if attention.use_linear_projection:
        return attention.proj_in(hidden.flatten(2).transpose(1, 2))
    return attention.proj_in(hidden).flatten(2).transpose(1, 2)
