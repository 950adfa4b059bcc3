"""What a prompt says of colours and of texture, and looks that training has seen to say it with: of those
that fit the words best the seed takes one (after retrieval-augmented diffusion, Blattmann et al. 2022, arXiv
2204.11824). A draft is drawn with it as with a context's.

How well words and a look fit is learned by contrast (InfoNCE, van den Oord et al. 2018), so that it is the
logarithm of how much likelier the look is with the words than without, but for a constant: what lies low
contradicts them; and words after which all looks are as likely as before tell nothing of them.

B prompts  N looks  V words of the tokenizer
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from context_diffusion.models.native.draft import STEPS, WAYS, curves_of, mirrored
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
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of what is finer than a ninth of a picture
NUMBERS = {"colours": 3 * PLACES, "texture": 2 * len(PERIODS) * len(SHARES) + 2 + len(QUANTILES)}
COMPARED, HIDDEN = 32, 128
NEAREST = 4  # looks of which the seed takes one
RELIEF = 256.0  # steps of a kept relief to one of tone
# times as strong as training had it is a texture that words ask for: the query's own stands beside it
VIVID = 1.5


def make_network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, COMPARED))


class LookMemory(ModelMixin, ConfigMixin):
    """A component of the native model. vocabulary: V; looks, textures: how many are kept; side: pixels of a
    texture. One that has learned nothing takes no words for told, and nothing is recalled.

    Words are compared with looks in two views: as they are kept here, and as pictures show them, where a
    layout has its part in it."""

    config_name = "config.json"
    colours: Tensor  # (looks, WAYS, STEPS, 4): draft.Look's
    reliefs: Tensor  # int8 (textures, side, side), of tone
    limits: Tensor  # (KINDS, 2), nats: what words tell of it at least, and what fits them at least

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
        """NativeModel.known_words' (B, V) -> (B, N): how well each kept look fits them."""
        return self.read_kept[kind](words.to(self.dtype)).float() @ getattr(self, f"{kind}_keys").float().T

    def told(self, kind: Kind, words: Tensor) -> Tensor:
        """(B, V) -> (B,): nats that they tell of it, the divergence of the looks' chances from equal ones."""
        chances = self.fits(kind, words).log_softmax(1)
        return (chances.exp() * chances).sum(1) + math.log(chances.shape[1])

    def fits_seen(self, kind: Kind, words: Tensor, described: Tensor) -> Tensor:
        """Words (B, V), descriptions of what contexts show (B, numbers) -> (B,)."""
        read, seen = self.read_seen[kind](words.to(self.dtype)), self.see[kind](described.to(self.dtype))
        return (read * seen).sum(1).float()

    def says(self, kind: Kind, words: Tensor) -> bool:
        """Whether words (1, V) tell of it."""
        return bool(self.told(kind, words).item() > self.limits[KINDS.index(kind), 0].item())

    def contradict(self, kind: Kind, words: Tensor, described: Tensor) -> bool:
        """Whether words (1, V) are not what contexts show, (1, numbers)."""
        return bool(self.fits_seen(kind, words, described).item() < self.limits[KINDS.index(kind), 1].item())

    def recall(self, kind: Kind, words: Tensor, seed: int) -> int:
        """The number of a look for words (1, V): by the seed one of those that fit best."""
        fits = self.fits(kind, words)[0]
        nearest = fits.topk(min(NEAREST, len(fits))).indices
        return int(nearest[seed // len(nearest) ** KINDS.index(kind) % len(nearest)])

    def relief(self, number: int, height: int, width: int) -> Tensor:
        """(1, H, W), in tone; mirrored where a picture is larger."""
        return mirrored(self.reliefs[number][None].float(), height, width) * (VIVID / RELIEF)


def describe_colours(colours: Tensor) -> Tensor:
    """draft.Look's (N, WAYS, STEPS, 4) -> (N, numbers): the curve by rank, coarsely."""
    curve = curves_of(colours.float())[:, 0].transpose(1, 2)
    return F.adaptive_avg_pool1d(curve, PLACES).flatten(1)


def describe_relief(lightness: Tensor) -> Tensor:
    """(N, 1, S, S) in [0, 1] -> (N, numbers): models/texture_features.py's, whatever way it is turned, and
    how its values are spread."""
    found = describe_textures(lightness)
    energies = found[:, :-2].unflatten(1, (len(PERIODS), ANGLES, len(SHARES)))
    fine = fine_of(F.adaptive_avg_pool2d(lightness, SIDE)).flatten(1)
    spread = torch.quantile(fine / (fine.std(1, keepdim=True) + 0.003), fine.new_tensor(QUANTILES), dim=1).T
    return torch.cat(
        [
            energies.mean(2).flatten(1),
            (energies.amax(2) - energies.mean(2)).flatten(1),
            found[:, -2:],
            spread,
        ],
        1,
    )
