"""Which draft a lane of a row begins from: the query's tones in the contexts' look, or, where the prompt says otherwise, in
one that the model remembers for its words (models/native/look_memory.py)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from context_diffusion.core.records import Control, Request
from context_diffusion.engine.backbone import Conditions
from context_diffusion.engine.conditioning import Context, content_key, control_scales, to_tensor
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, words_lead
from context_diffusion.models.native.draft import CHANNELS, PICTURE_KINDS, STEPS, WAYS, Layout, Look, draft
from context_diffusion.models.native.look_memory import KINDS, Kind, describe_colours, describe_relief
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.plane_waves import COUNT
from context_diffusion.models.native.preconditioning import EncodedDraft
from context_diffusion.models.normalization import lightness_of

BLANK = Look(torch.zeros(1, WAYS, STEPS, 4), torch.zeros(1, COUNT, 4), torch.zeros(1, 1, 1))


class Wanted(NamedTuple):
    """What a lane's draft is made of: contexts, and numbers of remembered looks that take the place of what they show."""

    contexts: list[Context]
    recalled: dict[Kind, int]

    @property
    def key(self) -> str:
        shown = [f"{one.key}*{one.weight}" for one in self.contexts]
        return ":".join([*shown, *(f"{kind}={number}" for kind, number in self.recalled.items())])


class NativeDrafts:
    def __init__(self, model: NativeModel) -> None:
        self.model, self.factor = model, model.image_size // model.latent_shape[1]

    def of(self, request: Request, branch: Branch, shown: list[Context], cache: Cache) -> tuple[Conditions, Conditions]:
        """-> of a lane, and what is kept for the end of what it draws. A lane without a draft has zeros."""
        model, scale = self.model, min(request.settings.context_scale, 1.0)
        wanted = self._wanted(request, branch, [one for one in shown if one.weight and scale], cache)
        if not (wanted.contexts or wanted.recalled):
            return self._lane(self._no_draft(request), 1.0), {}
        drawn, kept = self._draft_of(request.controls[0], wanted, cache)
        share = 1.0 if "colours" in wanted.recalled else scale
        if kept:
            detail = model.detail_scale * share * min(control_scales(request, 1)[0], 1.0)
            kept = kept | {"share": drawn.pixels.new_full((1, 1, 1, 1), detail)}
        return self._lane(drawn, share), kept

    def _lane(self, drawn: EncodedDraft, share: float) -> Conditions:
        return {"draft": share * drawn.pixels.to(self.model.dtype), "draft_latents": share * drawn.latents.to(self.model.dtype)}

    def _no_draft(self, request: Request) -> EncodedDraft:
        height, width = (side // self.factor for side in request.query.shape[:2])
        channels = CHANNELS * self.factor**2, self.model.latent_shape[0]
        return EncodedDraft(*(torch.zeros(1, count, height, width, device=self.model.device) for count in channels))

    def _wanted(self, request: Request, branch: Branch, shown: list[Context], cache: Cache) -> Wanted:
        nothing = Wanted([], {})
        if not (request.controls and request.controls[0].kind in PICTURE_KINDS):
            return nothing
        contexts = shown if branch.contexts else []
        # Guidance is away from a lane's draft, not only from what the U-Net says: of the lanes that see the contexts both are
        # drawn with the prompt's look, or twice the guidance were a colour as far on the other side of the prompt's.
        prompt = (request.prompt if branch.contexts else request.negative_prompt) or ""
        if not prompt or (contexts and not words_lead(request.settings)):
            return Wanted(contexts, {})
        words = cache.get(f"words:{prompt}", lambda: self.model.known_words([prompt]))
        told = [kind for kind in KINDS if self.model.memory.says(kind, words)]
        if contexts:
            told = [kind for kind in told if self.model.memory.contradict(kind, words, self._shown(kind, contexts, cache))]
        elif told:
            told = list(KINDS)  # a draft needs colours, whatever the words leave open
        seed = request.settings.seed or 0
        return Wanted(contexts, {kind: self.model.memory.recall(kind, words, seed) for kind in told})

    def _shown(self, kind: Kind, contexts: list[Context], cache: Cache) -> Tensor:
        """(1, numbers): what all contexts together show of it."""
        weights = torch.tensor([one.weight for one in contexts], device=self.model.device)[:, None]
        if kind == "texture":
            reliefs = [cache.get(f"relief:{one.key}", partial(self._relief, one.pixels)) for one in contexts]
            return (torch.cat(reliefs) * weights).sum(0, keepdim=True) / weights.sum()
        colours = torch.cat([look.colours for look in self._looks(contexts, cache)])
        return describe_colours((colours * weights[..., None, None]).sum(0, keepdim=True))

    def _looks(self, contexts: list[Context], cache: Cache) -> list[Look]:
        return [cache.get(f"look:{one.key}", partial(self._look, one.pixels)) for one in contexts]

    def _look(self, pixels: Any) -> Look:
        return self.model.look(to_tensor(pixels).to(self.model.device))

    def _relief(self, pixels: Any) -> Tensor:
        return describe_relief(lightness_of(to_tensor(pixels).to(self.model.device).float()) / 255)

    def _draft_of(self, control: Control, wanted: Wanted, cache: Cache) -> tuple[EncodedDraft, Conditions]:
        key = f"{control.kind}:{content_key(control.pixels)}"
        layout = cache.get(f"tones:{key}", partial(self._tones, control))
        looks = self._looks(wanted.contexts, cache)
        return cache.get(f"draft:{key}:{wanted.key}", partial(self._make_draft, layout, wanted, looks))

    def _make_draft(self, layout: Layout, wanted: Wanted, looks: list[Look]) -> tuple[EncodedDraft, Conditions]:
        """A draft, and of it what is needed to give its detail back: nothing where that isn't asked for."""
        memory, weights, relief = self.model.memory, [one.weight for one in wanted.contexts] or [1.0], None
        parts = zip(*(looks or [BLANK]), strict=True)
        colours, waves, rest = (torch.stack(part, 1).to(layout.tones.device) for part in parts)
        if (number := wanted.recalled.get("colours")) is not None:
            colours = memory.colours[number].expand_as(colours)
        if (number := wanted.recalled.get("texture")) is not None:
            waves, rest = torch.zeros_like(waves), torch.zeros_like(rest)
            relief = memory.relief(number, *layout.tones.shape[2:])
        drafts = draft(layout, Look(colours, waves, rest), torch.tensor([weights], device=self.model.device), relief)
        drawn = self.model.encode_draft(drafts)
        if not self.model.detail_scale:
            return drawn, {}
        whole, copy = self.model.detail(drafts, drawn)
        return drawn, {"draft": whole, "copy": copy}

    def _tones(self, control: Control) -> Layout:
        return self.model.layout(to_tensor(control.pixels).to(self.model.device), [control.kind])
