"""The looks, colours and textures seen in training, that a prompt's words describe. Of those that fit the
words best the seed selects one (after retrieval-augmented diffusion, Blattmann et al. 2022, arXiv
2204.11824). A draft uses it like the look of a context.

How well words and a look fit is learned by contrast (InfoNCE, van den Oord et al. 2018), so that it is, up to
a constant, the logarithm of how much likelier the look is with the words than without: a low value means that
they contradict each other, and words that leave all looks equally likely describe none.

B prompts  N looks  V words of the tokenizer
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.models.native.colour_transport import lab_of, rgb_of
from context_diffusion.models.native.draft import RATE, STEPS, WAYS, curves_of, mirrored
from context_diffusion.models.native.words import NamedColour
from context_diffusion.models.texture_features import (
    ANGLES,
    PERIODS,
    SHARES,
    SIDE,
    describe_textures,
    fine_of,
)

Kind = Literal["colours", "texture"]
KINDS: tuple[Kind, ...] = ("colours", "texture")
PLACES = 16  # of a curve of colours
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of what is finer than a ninth of an image
NUMBERS = {"colours": 3 * PLACES, "texture": 2 * len(PERIODS) * len(SHARES) + 2 + len(QUANTILES)}
COMPARED, HIDDEN = 32, 128
NEAREST = 4  # looks of which the seed selects one
RELIEF = 256.0  # steps of a kept relief to one of tone
# factor of the strength in training of a texture that words ask for: the query's own is there too
VIVID = 1.5

DARKER, LIGHTER = 45.0, 40.0  # lightness from a named colour to the ends of its curve
NARROW = 0.65  # of these, what a colour loses for each unit of lightness beyond LIMITS
LIMITS = (20.0, 85.0)
APART = 18.0  # lightness between two named colours, at least, so that the layout stays
ENDS = (3.0, 98.0)  # of the lightness of a curve
ALIKE = 8.0  # mean distance in Lab up to which contexts show the colours that a prompt names


def make_network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, COMPARED))


class LookMemory(ModelMixin, ConfigMixin):
    """A component of the native model. vocabulary: V; looks, textures: how many are kept; side: pixels of a
    texture. Before training, no words name a look, and nothing is recalled.

    Words are compared with looks in two views: as they are kept here, and as images show them, which depends
    on the layout too."""

    config_name = "config.json"
    colours: Tensor  # (looks, WAYS, STEPS, 4): draft.Look's
    reliefs: Tensor  # int8 (textures, side, side), of tone
    limits: Tensor  # (KINDS, 2), nats: at least how clearly words name it, and at least how well it fits them

    @register_to_config
    def __init__(self, vocabulary: int = 128, looks: int = 512, textures: int = 128, side: int = 128) -> None:
        super().__init__()
        self.read_kept, self.read_seen = (
            nn.ModuleDict({kind: make_network(vocabulary) for kind in KINDS}) for _ in range(2)
        )
        self.see = nn.ModuleDict({kind: make_network(NUMBERS[kind]) for kind in KINDS})
        self.register_buffer("colours", torch.zeros(looks, WAYS, STEPS, 4))
        self.register_buffer("reliefs", torch.zeros(textures, side, side, dtype=torch.int8))
        for kind, count in (("colours", looks), ("texture", textures)):
            self.register_buffer(f"{kind}_keys", torch.zeros(count, COMPARED))
        self.register_buffer("limits", torch.tensor([[torch.inf, -torch.inf]] * len(KINDS)))

    def fits(self, kind: Kind, words: Tensor) -> Tensor:
        """Return how well each kept look fits words, (B, N). words: of NativeModel.known_words, (B, V)."""
        return self.read_kept[kind](words.to(self.dtype)).float() @ getattr(self, f"{kind}_keys").float().T

    def information(self, kind: Kind, words: Tensor) -> Tensor:
        """Return how clearly words (B, V) name a look, (B,) in nats: the divergence of the looks' chances
        from equal ones."""
        chances = self.fits(kind, words).log_softmax(1)
        return (chances.exp() * chances).sum(1) + math.log(chances.shape[1])

    def fits_seen(self, kind: Kind, words: Tensor, described: Tensor) -> Tensor:
        """Return how well words (B, V) fit descriptions of what contexts show (B, numbers), as (B,)."""
        read, seen = self.read_seen[kind](words.to(self.dtype)), self.see[kind](described.to(self.dtype))
        return (read * seen).sum(1).float()

    def says(self, kind: Kind, words: Tensor) -> bool:
        """Return whether words (1, V) name a look of the kind."""
        return bool(self.information(kind, words).item() > self.limits[KINDS.index(kind), 0].item())

    def contradict(self, kind: Kind, words: Tensor, described: Tensor) -> bool:
        """Return whether words (1, V) contradict what contexts show, (1, numbers)."""
        return bool(self.fits_seen(kind, words, described).item() < self.limits[KINDS.index(kind), 1].item())

    def recall(self, kind: Kind, words: Tensor, seed: int) -> int:
        """Return the number of a look for words (1, V): by the seed one of those that fit best."""
        fits = self.fits(kind, words)[0]
        nearest = fits.topk(min(NEAREST, len(fits))).indices
        return int(nearest[seed // len(nearest) ** KINDS.index(kind) % len(nearest)])

    def relief(self, number: int, height: int, width: int) -> Tensor:
        """Return a kept texture, (1, H, W), in tone; mirrored where the image is larger."""
        return mirrored(self.reliefs[number][None].float(), height, width) * (VIVID / RELIEF)


def describe_colours(colours: Tensor) -> Tensor:
    """Describe draft.Look's colours (N, WAYS, STEPS, 4) by numbers (N, numbers): the curve by rank,
    coarsely."""
    curve = curves_of(colours.float())[:, 0].transpose(1, 2)
    return F.adaptive_avg_pool1d(curve, PLACES).flatten(1)


def named_colours(colours: Sequence[NamedColour]) -> Tensor:
    """Return draft.Look's colours, (WAYS, STEPS, 4), of a curve from dark to light through named colours."""
    named = _lab_of(colours)
    named = named[named[:, 0].argsort(stable=True)]
    count = len(named)
    stops = _spread(named[:, 0])
    darker = DARKER - NARROW * max(stops[0] - LIMITS[1], 0)
    lighter = LIGHTER - NARROW * max(LIMITS[0] - stops[-1], 0)
    stops = [stops[0] - darker / math.sqrt(count), *stops, stops[-1] + lighter / math.sqrt(count)]
    at = (np.arange(STEPS) + 0.5) / STEPS
    # A step of the way by stds has the colour of its rank among evenly spread tones.
    tones = np.stack([at, np.clip((at - 0.5) / RATE[1] + 0.5, 0, 1)])
    middles = (np.arange(count) + 0.5) / count
    light = torch.from_numpy(np.interp(tones, [0, *middles, 1], np.clip(stops, *ENDS)))
    # A colour keeps half of the way to the next one.
    edges = (middles[:, None] + np.array([-0.25, 0.25]) / count).ravel()
    named_light, a, b = (
        torch.from_numpy(np.interp(tones, edges, np.repeat(part, 2))) for part in named.double().T.numpy()
    )
    # Towards black and white chroma falls, as in the space of colours.
    chroma = torch.minimum(light / named_light, (100 - light) / (100 - named_light)).clamp(0, 1)
    curve = rgb_of(torch.stack([light, a * chroma, b * chroma])[None].float())[0].permute(1, 2, 0)
    return torch.cat([curve, torch.ones_like(curve[..., :1])], -1) / STEPS


def shows_colours(named: Tensor, colours: Tensor) -> bool:
    """Return whether contexts of these colours show the named ones, both (WAYS, STEPS, 4)."""
    wanted, present = (
        lab_of(curves_of(part[None].float())[:, 0].permute(2, 0, 1)[None] / 2 + 0.5)[0, :, 0].T
        for part in (named, colours)
    )
    return float((present[:, None] - wanted).square().sum(2).sqrt().amin(1).mean()) < ALIKE


def _lab_of(colours: Sequence[NamedColour]) -> Tensor:
    """Return named colours with their modifiers, Lab (N, 3)."""
    rgb = torch.tensor([list(bytes.fromhex(colour.rgb)) for colour in colours]) / 255
    lab = lab_of(rgb.T[None, :, None])[0, :, 0].T
    lighter = torch.tensor([colour.lighter for colour in colours])
    chroma = torch.tensor([colour.chroma for colour in colours])
    light = (lab[:, 0] + lighter).clamp(*ENDS)
    return torch.cat([light[:, None], lab[:, 1:] * chroma[:, None]], 1)


def _spread(lightness: Tensor) -> list[float]:
    """Move rising values apart, so that neighbours differ by APART where there is room; the mean stays."""
    gap = min(APART, 70 / len(lightness))
    apart: list[float] = []
    for light in lightness.tolist():
        apart.append(max(light, apart[-1] + gap) if apart else light)
    shift = float(lightness.mean()) - sum(apart) / len(apart)
    return [min(max(light + shift, ENDS[0]), ENDS[1]) for light in apart]


def describe_relief(lightness: Tensor) -> Tensor:
    """Describe textures (N, 1, S, S) in [0, 1] by numbers (N, numbers): those of models/texture_features.py
    in any orientation, and how the values are spread."""
    features = describe_textures(lightness)
    energies = features[:, :-2].unflatten(1, (len(PERIODS), ANGLES, len(SHARES)))
    fine = fine_of(F.adaptive_avg_pool2d(lightness, SIDE)).flatten(1)
    spread = torch.quantile(fine / (fine.std(1, keepdim=True) + 0.003), fine.new_tensor(QUANTILES), dim=1).T
    return torch.cat(
        [
            energies.mean(2).flatten(1),
            (energies.amax(2) - energies.mean(2)).flatten(1),
            features[:, -2:],
            spread,
        ],
        1,
    )
