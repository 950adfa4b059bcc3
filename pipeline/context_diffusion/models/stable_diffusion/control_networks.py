"""The ControlNets of a Stable Diffusion, plain and union ones: what they read of a row, encoded once, and
their residuals at each step.

A union ControlNet (xinsir's ControlNet++) reads maps of several control types. For one map of one type it is
a plain ControlNet whose embedding of the map has a shift of the map's own, and whose time embedding has one
of the type's own. So both are computed once a row here, and a step runs the plain network. (diffusers' class
attends over the batch where it computes the shift, which would mix the lanes of different rows; all lanes of
one row have the same map, for which that attention is the token's own value.)

P lanes  T control types  D width of the time embedding  C h w latents
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn

from context_diffusion.core.errors import ErrorCode, RowError
from context_diffusion.core.records import Control, Request
from context_diffusion.engine.backbone import Conditions
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.models.attention import LaneInputs, attend_by_lanes, keys_and_values
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.conditioning import content_key, to_tensor
from context_diffusion.models.resolution.base_networks import check_controlnet
from context_diffusion.models.resolution.controlnets import UNION_TYPES, is_union
from context_diffusion.models.resolution.hub import read_json
from context_diffusion.models.stable_diffusion.depth_maps import DepthEstimator

CHANNEL_ORDER = "controlnet_conditioning_channel_order"  # of the maps that a ControlNet was trained on


def load_controlnets(loader: ComponentLoader, names: list[str], unet: Any) -> list[Any]:
    """Load the ControlNets of a base's U-Net; one that is named twice is loaded once. Raises ModelError."""
    loaded = {name: _load(loader, name) for name in dict.fromkeys(names)}
    for name, network in loaded.items():
        check_controlnet(name, network.config, unet.config)
    return [loaded[name] for name in names]


def _load(loader: ComponentLoader, name: str) -> Any:
    if is_union(read_json(name, "config.json", loader.parts.revision)):
        return loader(ControlNetUnionModel, name)
    return loader.component(ControlNetModel, name)


class ControlNetworks:
    """Run ControlNets beside a U-Net. loaded: ControlNets on their device, the same object where one is named
    twice. depth: computes the maps that rows leave to the engine."""

    def __init__(self, loaded: list[Any], depth: DepthEstimator | None) -> None:
        distinct = list({id(network): network for network in loaded}.values())
        place_of = {id(network): place for place, network in enumerate(distinct)}
        self.places = [place_of[id(network)] for network in loaded]
        self.embeddings = [MapEmbedding(network) for network in distinct]
        self.networks = [_stepping(network) for network in distinct]
        self.layers = [attend_by_lanes(network) for network in self.networks]
        self.depth = depth

    def __len__(self) -> int:
        return len(self.places)

    def text(self, hidden: Tensor) -> Conditions:
        """Return the keys and values of each network's layers for a prompt's hidden states (1, L, D)."""
        return {f"net{place}": keys_and_values(layers, hidden) for place, layers in enumerate(self.layers)}

    def maps(self, request: Request, cache: Cache) -> Conditions:
        """Embed the control maps of a row, one for each ControlNet. Raises RowError."""
        conditions: Conditions = {}
        maps = []
        for n, (place, control) in enumerate(zip(self.places, request.controls, strict=True)):
            embedding = self.embeddings[place]
            if embedding.types is not None:
                conditions[f"type{n}"] = embedding.type_of(control.kind)
            source = content_key(request.query if control.pixels is None else control.pixels)
            estimated = " of the query" if control.pixels is None else ""
            key = f"control{n}:{control.kind}{estimated}:{source}"
            maps.append(cache.get(key, partial(self._embed, embedding, control, request, cache)))
        return {"maps": tuple(maps), **conditions}

    def _embed(self, embedding: MapEmbedding, control: Control, request: Request, cache: Cache) -> Tensor:
        """Embed a control map, (1, C, h, w), after the engine's estimator has made it where the row has
        none."""
        if control.pixels is None and control.kind == "depth" and self.depth is not None:
            key = f"depth:{content_key(request.query)}"
            return embedding(cache.get(key, partial(self.depth, request.query)), control.kind)
        return embedding(to_tensor(control.given, embedding.device), control.kind)

    def residuals(
        self, latents: Tensor, timesteps: Tensor, lanes: Any, added: dict[str, Tensor], control: Any
    ) -> list[Tensor]:
        """Return the sum of the ControlNets' residuals, one a skip connection and the middle one last."""
        total: list[Tensor] = []
        for n, place in enumerate(self.places):
            down, mid = self.networks[place](
                latents,
                timesteps,
                encoder_hidden_states=None,
                controlnet_cond=control["maps"][n],
                timestep_cond=control.get(f"type{n}"),
                added_cond_kwargs=added,
                cross_attention_kwargs={"lanes": LaneInputs(lanes[f"net{place}"], lanes.get("bias"))},
                return_dict=False,
            )
            scale = control["scale"][:, n, None, None, None]
            scaled = [residual * scale for residual in (*down, mid)]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return total


class MapEmbedding:
    """Embed control maps for a ControlNet: they depend on the row alone, not on the step.

    types: (T, D), what a union ControlNet adds to the time embedding for each control type; None: a plain
    one."""

    def __init__(self, network: Any) -> None:
        self.embed = network.controlnet_cond_embedding
        self.reversed = network.config.get(CHANNEL_ORDER) == "bgr"
        self.union = network if isinstance(network, ControlNetUnionModel) else None
        self.types = None if self.union is None else _type_embeddings(self.union)

    @property
    def device(self) -> torch.device:
        return self.embed.conv_in.weight.device

    def type_of(self, kind: str) -> Tensor:
        """Return the embedding (1, D) of a kind's control type. Raises RowError where there is none."""
        assert self.types is not None, "a union ControlNet"
        place = self._place(kind)
        return self.types[place : place + 1]

    def __call__(self, pixels: Tensor, kind: str) -> Tensor:
        """Embed a map, uint8 (1, 3, H, W), to (1, C, h, w)."""
        pixels = pixels.flip(1) if self.reversed else pixels
        embedded = self.embed((pixels / 255).to(self.embed.conv_in.weight.dtype))
        if self.union is None:
            return embedded
        tokens = (embedded.mean((2, 3)) + self.union.task_embedding[self._place(kind)])[None]
        for layer in self.union.transformer_layes:  # diffusers' spelling
            tokens = layer(tokens)
        return embedded + self.union.spatial_ch_projs(tokens[0])[:, :, None, None]

    def _place(self, kind: str) -> int:
        place = UNION_TYPES.get(kind)
        if place is None or self.types is None or place >= len(self.types):
            raise RowError(ErrorCode.INVALID_SETTING, f"control: the union ControlNet has no type for {kind}")
        return place


@torch.no_grad()
def _type_embeddings(union: Any) -> Tensor:
    """Return the embeddings of all control types, (T, D)."""
    count = union.config.num_control_type
    chosen = torch.eye(count, device=union.task_embedding.device)
    waves = union.control_type_proj(chosen.flatten()).reshape(count, -1)
    return union.control_add_embedding(waves.to(union.task_embedding.dtype))


def _stepping(network: Any) -> Any:
    """Return what runs at each step: the ControlNet without the embedding of its maps; of a union one the
    plain ControlNet in it."""
    if isinstance(network, ControlNetUnionModel):
        network = _plain(network)
    network.register_to_config(**{CHANNEL_ORDER: "rgb"})  # MapEmbedding has followed it
    network.controlnet_cond_embedding = nn.Identity()
    return network


def _plain(union: Any) -> Any:
    """Return a ControlNetModel of a union ControlNet's own layers; its `timestep_cond` is added to the time
    embedding."""
    with torch.device("meta"):  # its weights are replaced
        plain = ControlNetModel.from_config(dict(union.config))
    for name, _ in list(plain.named_children()):
        setattr(plain, name, getattr(union, name))
    plain.time_embedding = _ShiftedEmbedding(union.time_embedding)
    return plain.eval().requires_grad_(False)


class _ShiftedEmbedding(nn.Module):
    """A time embedding to which each lane's own vector is added."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, timesteps: Tensor, shift: Tensor) -> Tensor:
        return self.embedding(timesteps) + shift
