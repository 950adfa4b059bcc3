"""The draft that each lane of a row begins from: the query's tones in the look of the contexts, or in the
look that the model remembers for the prompt's words where they ask for another
(models/native/look_memory.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from context_diffusion.core.records import Control, Request
from context_diffusion.engine.backbone import Conditions
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.engine.guidance import Branch, words_lead
from context_diffusion.models.conditioning import (
    Context,
    content_key,
    control_scales,
    to_tensor,
    weighted_contexts,
)
from context_diffusion.models.native.colour_transport import Palette, mixed_palettes, palette_of
from context_diffusion.models.native.draft import (
    CHANNELS,
    PICTURE_KINDS,
    STEPS,
    TEXTURED,
    WAYS,
    Layout,
    Look,
    average_textures,
    draft,
    tones_of,
)
from context_diffusion.models.native.draft_image import draft_image, synthesise, texture_of
from context_diffusion.models.native.look_memory import (
    KINDS,
    Kind,
    describe_colours,
    describe_relief,
    named_colours,
    shows_colours,
)
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.native.preconditioning import EncodedDraft
from context_diffusion.models.native.words import NamedColour, PromptWords, read_words
from context_diffusion.models.normalization import lightness_of

Detail = dict[str, Tensor]  # what a finished image is made of: see NativeDrafts.of
BLANK = Look(torch.zeros(1, WAYS, STEPS, 4), torch.zeros(1, 1, 1))


class Wanted(NamedTuple):
    """The parts of a lane's draft: contexts, and the numbers of remembered looks, by kind, and the named
    colours that replace theirs."""

    contexts: list[Context]
    recalled: dict[Kind, int]
    named: tuple[NamedColour, ...] = ()

    @property
    def key(self) -> str:
        weighted = [f"{context.key}*{context.weight}" for context in self.contexts]
        recalled = [f"{kind}={number}" for kind, number in self.recalled.items()]
        return ":".join([*weighted, *recalled, *map(str, self.named)])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to make a draft of."""
        return not (self.contexts or self.recalled or self.named)

    @property
    def replaces_colours(self) -> bool:
        return bool(self.named) or "colours" in self.recalled


class NativeDrafts:
    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.factor = model.image_size // model.latent_shape[1]

    def of(
        self, request: Request, branch: Branch, contexts: list[Context], cache: Cache
    ) -> tuple[Conditions, Detail]:
        """Return a lane's conditions, zeros for a lane without a draft, and the detail of which its image is
        made.

        The detail has the images `drafts` and `copies`, the autoencoder's reconstruction, the `share` of the
        draft in the image and the `rest_scale` of what the diffusion model changed; it is empty where there
        is no draft."""
        wanted = self._wanted(request, branch, _acting(contexts, request), cache)
        if wanted.is_empty:
            return self._lane(self._no_draft(request)), {}
        encoded, detail = self._draft_of(request, wanted, cache)
        if not detail:
            return self._lane(encoded), {}
        strength = self.model.detail_scale * min(control_scales(request, 1)[0], 1.0)
        # Image to image starts from the query: the less noise it has had, the more of the decoded image is
        # the answer.
        noise_share = 1.0 if request.settings.strength is None else request.settings.strength
        rest_scale = 1 - noise_share + noise_share * self.model.rest_scale
        detail = detail | {
            "share": encoded.pixels.new_full((1, 1, 1, 1), strength),
            "rest_scale": encoded.pixels.new_full((1, 1, 1, 1), rest_scale),
        }
        return self._lane(encoded), detail

    def _lane(self, encoded: EncodedDraft) -> Conditions:
        return {
            "draft": encoded.pixels.to(self.model.dtype),
            "draft_latents": encoded.latents.to(self.model.dtype),
        }

    def _no_draft(self, request: Request) -> EncodedDraft:
        height, width = (side // self.factor for side in request.query.shape[:2])
        channels = CHANNELS * self.factor**2, self.model.latent_shape[0]
        return EncodedDraft(
            *(torch.zeros(1, count, height, width, device=self.model.device) for count in channels)
        )

    def _wanted(self, request: Request, branch: Branch, row_contexts: list[Context], cache: Cache) -> Wanted:
        nothing = Wanted([], {})
        if not (request.controls and request.controls[0].kind in PICTURE_KINDS):
            return nothing
        contexts = row_contexts if branch.contexts else []
        # Guidance also moves away from a lane's draft: both lanes that see the contexts get a draft in the
        # prompt's look,
        # or guidance would move the colours past those of the prompt.
        prompt = (request.prompt if branch.contexts else request.negative_prompt) or ""
        if not prompt or (contexts and not words_lead(request.settings)):
            return Wanted(contexts, {})
        read = self.words(prompt, cache)
        words = cache.get(f"words:{prompt}", lambda: self.model.known_words([read.text]))
        # Colours that the prompt names take precedence over those that the memory has for its words.
        said = [kind for kind in KINDS if self.model.memory.says(kind, words)]
        kinds = [kind for kind in said if not (read.colours and kind == "colours")]
        if contexts:
            kinds = [
                kind
                for kind in kinds
                if self.model.memory.contradict(kind, words, self._described(kind, contexts, cache))
            ]
        elif kinds and not read.colours:
            kinds = list(KINDS)  # a draft needs colours, whatever the words leave open
        seed = request.settings.seed or 0
        recalled = {kind: self.model.memory.recall(kind, words, seed) for kind in kinds}
        return Wanted(contexts, recalled, self._contradicted(read.colours, contexts, cache))

    def words(self, prompt: str | None, cache: Cache) -> PromptWords:
        """Read a prompt's words."""
        return cache.get(f"read:{prompt}", lambda: read_words(prompt, self.model.tokenizer.get_vocab()))

    def _contradicted(
        self, named: tuple[NamedColour, ...], contexts: list[Context], cache: Cache
    ) -> tuple[NamedColour, ...]:
        """Return named colours, none if the contexts show them already."""
        if not (named and contexts):
            return named
        repeats_them = shows_colours(named_colours(named), self._mean_colours(contexts, cache).cpu())
        return () if repeats_them else named

    def _described(self, kind: Kind, contexts: list[Context], cache: Cache) -> Tensor:
        """Return the description (1, numbers) of one kind of look, over all contexts together."""
        if kind == "texture":
            weights = torch.tensor([context.weight for context in contexts], device=self.model.device)[
                :, None
            ]
            reliefs = [
                cache.get(f"relief:{context.key}", partial(self._relief, context.pixels))
                for context in contexts
            ]
            return (torch.cat(reliefs) * weights).sum(0, keepdim=True) / weights.sum()
        return describe_colours(self._mean_colours(contexts, cache)[None])

    def _mean_colours(self, contexts: list[Context], cache: Cache) -> Tensor:
        """Return the colours of Look, (WAYS, STEPS, 4), summed over contexts by weight."""
        weights = torch.tensor([context.weight for context in contexts], device=self.model.device)
        colours = torch.cat([look.colours for look in self._looks(contexts, cache)])
        return (colours * weights[:, None, None, None]).sum(0)

    def _replacing_colours(self, wanted: Wanted) -> Tensor:
        """Return the colours (WAYS, STEPS, 4) that a prompt asks for."""
        if wanted.named:
            return named_colours(wanted.named).to(self.model.device)
        return self.model.memory.colours[wanted.recalled["colours"]].float()

    def _looks(self, contexts: list[Context], cache: Cache) -> list[Look]:
        return [cache.get(f"look:{context.key}", partial(self._look, context.pixels)) for context in contexts]

    def _look(self, pixels: Any) -> Look:
        return self.model.look(self.model.context_pixels(to_tensor(pixels, self.model.device)))

    def _relief(self, pixels: Any) -> Tensor:
        return describe_relief(
            lightness_of(self.model.context_pixels(to_tensor(pixels, self.model.device)).float()) / 255
        )

    def image_of(self, request: Request) -> Tensor:
        """Return a row's draft alone, (1, 3, H, W) in [0, 1]. Raises ValueError for a row without a draft."""
        contexts = _acting(weighted_contexts(request, self.model.context_slots), request)
        cache = Cache(2**26)
        wanted = self._wanted(request, Branch(1.0, contexts=True, prompt=True), contexts, cache)
        if wanted.is_empty:
            raise ValueError(
                f"row {request.id}: no draft without contexts and a control map that shows tones"
            )
        tones = tones_of(to_tensor(request.controls[0].given, self.model.device))
        return self._image(request, tones, wanted, self._looks(wanted.contexts, cache), cache)

    def _draft_of(self, request: Request, wanted: Wanted, cache: Cache) -> tuple[EncodedDraft, Detail]:
        control = request.controls[0]
        key = f"{control.kind}:{content_key(control.given)}:{content_key(request.query)}"
        layout = cache.get(f"tones:{key}", partial(self._tones, control))
        looks = self._looks(wanted.contexts, cache)
        seed = request.settings.seed or 0

        def make() -> tuple[EncodedDraft, Detail]:
            image = self._image(request, layout.tones.float(), wanted, looks, cache)
            return self._make_draft(layout, wanted, looks, image)

        scale = request.settings.context_scale
        return cache.get(f"draft:{key}:{wanted.key}:{scale}:{seed}", make)

    def _image(
        self, request: Request, tones: Tensor, wanted: Wanted, looks: list[Look], cache: Cache
    ) -> Tensor:
        """Return the draft as an image (1, 3, H, W). tones: of draft.tones_of, (1, WAYS, H, W)."""
        weights = torch.tensor([context.weight for context in wanted.contexts], device=self.model.device)
        if wanted.replaces_colours:
            colours, palette = self._replacing_colours(wanted)[None], None
        else:
            colours = self._mean_colours(wanted.contexts, cache)[None]
            palettes = [
                cache.get(f"palette:{c.key}", partial(self._palette, c.pixels)) for c in wanted.contexts
            ]
            palette = mixed_palettes(palettes, weights.tolist())
        query = to_tensor(request.query, self.model.device)
        image = draft_image(query, tones, colours, palette, self._texture(request, wanted, weights, cache))
        # Contexts of a smaller scale leave the query more of its own look.
        scale = 1.0 if wanted.replaces_colours else min(request.settings.context_scale, 1.0)
        return torch.lerp(query.float() / 255, image, scale)

    def _texture(self, request: Request, wanted: Wanted, weights: Tensor, cache: Cache) -> Tensor:
        """Return the texture of a draft, (3, H, W)."""
        memory, (height, width) = self.model.memory, request.query.shape[:2]
        seed, side = request.settings.seed or 0, min(height, width)
        if (number := wanted.recalled.get("texture")) is not None:
            measured = min(side, memory.reliefs.shape[1])
            lightness = synthesise(memory.relief(number, measured, measured), height, width, seed)
            return torch.cat([lightness, lightness.new_zeros(2, height, width)])
        if not wanted.contexts:
            return weights.new_zeros(3, height, width)
        measured_textures = [
            cache.get(f"texture:{c.key}:{side}", partial(self._measured_texture, c.pixels, side))
            for c in wanted.contexts
        ]
        drawn = torch.stack([synthesise(texture, height, width, seed) for texture in measured_textures])
        return average_textures(drawn.transpose(0, 1), (weights / weights.sum())[None])

    def _palette(self, pixels: Any) -> Palette:
        return palette_of(to_tensor(pixels, self.model.device))

    def _measured_texture(self, pixels: Any, side: int) -> Tensor:
        return texture_of(self.model.relief, to_tensor(pixels, self.model.device), side)

    def _make_draft(
        self, layout: Layout, wanted: Wanted, looks: list[Look], image: Tensor
    ) -> tuple[EncodedDraft, Detail]:
        """Return a draft, and the images that the finished image is made of."""
        weights = [context.weight for context in wanted.contexts] or [1.0]
        parts = zip(*(looks or [BLANK]), strict=True)
        colours, texture = (torch.stack(part, 1).to(layout.tones.device) for part in parts)
        if wanted.replaces_colours:
            colours = self._replacing_colours(wanted).expand_as(colours)
        if "texture" in wanted.recalled:
            texture = torch.zeros_like(texture)
        drafts = draft(layout, Look(colours, texture), torch.tensor([weights], device=self.model.device))
        drafts[:, TEXTURED] = 2 * image - 1
        encoded = self.model.encode_draft(drafts)
        if not self.model.detail_scale:
            return encoded, {}
        return encoded, {"drafts": image, "copies": self.model.decode(encoded.latents).float()}

    def _tones(self, control: Control) -> Layout:
        return self.model.layout(to_tensor(control.given, self.model.device), [control.kind])


def _acting(contexts: list[Context], request: Request) -> list[Context]:
    """Return the contexts that a draft is made of, with weights relative to the largest."""
    if not request.settings.context_scale:
        return []
    largest = max((context.weight for context in contexts), default=0.0)
    return [replace(context, weight=context.weight / largest) for context in contexts if context.weight]
