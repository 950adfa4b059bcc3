"""Which blocks of a U-Net attend to the contexts: the row setting `context_blocks`. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# InstantStyle (Wang et al. 2024, arXiv 2404.02733): in SDXL one transformer of ten layers carries style, one
# carries layout. Those of SD 1.5 are of the authors' script, which calls them experimental.
SDXL_BLOCKS: dict[str, dict[str, Any]] = {
    "style": {"up": {"block_0": [0.0, 1.0, 0.0]}},
    "layout": {"down": {"block_2": [0.0, 1.0]}},
}
SD15_BLOCKS: dict[str, dict[str, Any]] = {
    "style": {"up": {"block_1": 1.0}},
    "layout": {"down": {"block_2": 1.0}, "mid": 1.0},
}


# diffusers' defaults of a U-Net's configuration.
DOWN = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
UP = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)


@dataclass(frozen=True)
class ContextBlocks:
    """The blocks of a U-Net with cross-attention.

    transformers: how many each has, by its place, such as ("down", 1); ("mid", 0) is the middle block. named:
    what `style` and `layout` stand for."""

    transformers: Mapping[tuple[str, int], int]
    named: Mapping[str, dict[str, Any]]

    def scales(self, value: str | Mapping[str, Any]) -> dict[str, float]:
        """Return the scale of each transformer, by its name in the U-Net, such as down_blocks.1.attentions.0.

        value: a valid `context_blocks`. A mapping has the form of diffusers' scales of an IP-Adapter: blocks
        that it leaves out have the scale 0. Raises ValueError for a block that the U-Net lacks."""
        if value == "all":
            return {name: 1.0 for place in self.transformers for name in self._names(place)}
        if isinstance(value, str):
            value = {side: scale for name in value.split("+") for side, scale in self.named[name].items()}
        scales = {name: 0.0 for place in self.transformers for name in self._names(place)}
        for place, scale in self._by_block(value):
            names = self._names(place)
            given = scale if isinstance(scale, list) else [scale]
            if len(given) not in (1, len(names)):
                raise ValueError(
                    f"{_label(place)} has {len(given)} scales, the block has {len(names)} transformers"
                )
            scales |= dict(zip(names, given * len(names) if len(given) == 1 else given, strict=True))
        return scales

    def _by_block(self, value: Mapping[str, Any]) -> list[tuple[tuple[str, int], Any]]:
        """Return the scale of each block that a mapping names, spread over the blocks of a side."""
        blocks: list[tuple[tuple[str, int], Any]] = []
        for side, scale in value.items():
            on_side = [place for place in self.transformers if place[0] == side]
            if not on_side:
                raise ValueError(f"{side!r} is none of the U-Net's {self._known()}")
            if not isinstance(scale, Mapping):
                blocks += [(place, scale) for place in on_side]
                continue
            labels = {_label(place): place for place in on_side}
            for name, block_scale in scale.items():
                if f"{side}.{name}" not in labels:
                    raise ValueError(f"{side}.{name} is none of the U-Net's {self._known()}")
                blocks.append((labels[f"{side}.{name}"], block_scale))
        return blocks

    def _known(self) -> str:
        return "blocks with cross-attention, " + ", ".join(map(_label, self.transformers))

    def _names(self, place: tuple[str, int]) -> list[str]:
        side, number = place
        block = "mid_block" if side == "mid" else f"{side}_blocks.{number}"
        return [f"{block}.attentions.{number}" for number in range(self.transformers[place])]


def _label(place: tuple[str, int]) -> str:
    side, number = place
    return side if side == "mid" else f"{side}.block_{number}"


def context_blocks(unet: Mapping[str, Any], xl: bool) -> ContextBlocks:
    """Return the blocks of a U-Net. unet: its config.json."""
    down, up = unet.get("down_block_types", DOWN), unet.get("up_block_types", UP)
    layers = unet.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list | tuple) else [layers] * len(down)
    transformers = {
        ("down", number): counts[number] for number, kind in enumerate(down) if kind.startswith("CrossAttn")
    }
    if (unet.get("mid_block_type") or "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        transformers["mid", 0] = 1
    transformers |= {
        ("up", number): counts[-1 - number] + 1
        for number, kind in enumerate(up)
        if kind.startswith("CrossAttn")
    }
    return ContextBlocks(transformers, SDXL_BLOCKS if xl else SD15_BLOCKS)
