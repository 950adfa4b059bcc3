"""Which branches of guidance a row needs, and with which weights they add up.

    e = e0 + s_c (e_C - e0) + s_t (e_CT - e_C)     (Brooks et al. 2023, InstructPix2Pix, eq. 3, contexts for
    images)
      = (1 - s_c) e0 + (s_c - s_t) e_C + s_t e_CT

A branch whose weight is zero is not run. A scale of 1 or less is no guidance, as in diffusers. Knows no
tensors."""

from __future__ import annotations

from dataclasses import dataclass

from context_diffusion.core.settings import Settings


@dataclass(frozen=True)
class Branch:
    """One lane of a row: its weight in the sum, and whether contexts and prompt are shown to it."""

    weight: float
    contexts: bool
    prompt: bool


def words_lead(settings: Settings) -> bool:
    """Return whether the prompt takes precedence over the contexts: unless their guidance scale is larger."""
    text_scale, context_scale = _scales(settings)
    return text_scale >= context_scale


def _scales(settings: Settings) -> tuple[float, float]:
    """Return the scales of the prompt and of the contexts."""
    text_scale, context_scale = max(settings.guidance_scale, 1.0), settings.context_guidance_scale
    return text_scale, text_scale if context_scale is None else max(context_scale, 1.0)


def guidance_branches(settings: Settings, has_prompt: bool) -> list[Branch]:
    """Return the branches of a row, 1 to 3. has_prompt: it differs from the negative one; if not, e_CT is
    e_C."""
    text_scale, context_scale = _scales(settings)
    if not has_prompt:
        text_scale = 0.0
    branches = [
        Branch(1.0 - context_scale, contexts=False, prompt=False),
        Branch(context_scale - text_scale, contexts=True, prompt=False),
        Branch(text_scale, contexts=True, prompt=True),
    ]
    return [branch for branch in branches if branch.weight != 0.0]
