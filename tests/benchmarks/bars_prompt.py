"""Prompt measures on held-out rows: an attribute without contexts, and with contexts that show another one.

    python tests/benchmarks/bars_prompt.py [MODEL] [--rows 256] [--steps 20]

Alone: palette and texture in a wording that training never uses, no context. Overridden: the contexts show
one palette or texture, the prompt names another; the truth is the variant of the style. Then with more
guidance for either side."""

from __future__ import annotations

import numpy as np
from bars_names import any_texture, palette_of, texture_of
from bars_rows import Row, given_model, held_out_rows, region_distance, request_of

from context_diffusion.core.settings import Settings
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.prompts import PALETTE_WORDS, TEXTURE_WORDS
from context_diffusion.training.data.styles import dress, vary
from context_diffusion.training.samples import make

# guidance of the prompt and of the contexts, as shares of what is given on top of 1
SIDES = {"as given": (1.0, 1.0), "more for the prompt": (2.0, 0.0), "more for the contexts": (0.0, 2.0)}


def alone(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    asked, unstyled = [], settings.model_copy(update={"context_scale": 0.0})  # as if there were none
    for number, row in enumerate(rows):
        rng = np.random.default_rng((13, number))
        prompt = (
            f"{rng.choice(TEXTURE_WORDS[row.style.texture])} texture in "
            f"{rng.choice(PALETTE_WORDS[row.style.palette])}"
        )
        asked.append(request_of(row, number, unstyled, prompt=prompt))
    made = list(zip(make(model, asked), rows, strict=True))
    texture = np.mean(
        [
            texture_of(image, row.tone, any_texture(row.style), turned=True) == row.style.texture
            for image, row in made
        ]
    )
    colour = np.mean([palette_of(image, row.tone) == row.style.palette for image, row in made])
    print(f"prompt alone, {len(rows)} rows: texture {texture:.3f}, palette {colour:.3f}", flush=True)


def overridden(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    wanted = [vary(np.random.default_rng((17, number)), row.style) for number, row in enumerate(rows)]
    prompts = []
    for number, (what, style) in enumerate(wanted):
        rng = np.random.default_rng((18, number))
        texture, colour = (
            rng.choice(TEXTURE_WORDS[style.texture]),
            rng.choice(PALETTE_WORDS.get(style.palette, [""])),
        )
        prompts.append(f"{colour} tones" if what == "palette" else f"{texture} texture")
    for side, shares in SIDES.items():
        more = settings.guidance_scale - 1
        scales = dict(
            zip(
                ("guidance_scale", "context_guidance_scale"),
                (1 + more * share for share in shares),
                strict=True,
            )
        )
        changed = settings.model_copy(update=scales)
        images = make(model, [request_of(row, i, changed, prompt=prompts[i]) for i, row in enumerate(rows)])
        won: dict[str, list[bool]] = {"texture": [], "palette": []}
        far = []
        for row, image, (what, style) in zip(rows, images, wanted, strict=True):
            if what == "texture":
                won[what].append(
                    texture_of(image, row.tone, any_texture(style), turned=True) == style.texture
                )
            else:
                won[what].append(palette_of(image, row.tone) == style.palette)
            far.append(region_distance(image, dress(row.tone, style, np.random.default_rng(1)), row.tone))
        shares_won = ", ".join(f"{what} {np.mean(right):.3f}" for what, right in won.items())
        print(f"overridden, {side}: {shares_won}; dE2000 to the variant {np.mean(far):.1f}", flush=True)


if __name__ == "__main__":
    given, model, settings = given_model(__doc__)
    rows = held_out_rows(given.rows, model.image_size)
    alone(model, [row for row in rows if row.style.palette != "random"], settings)
    overridden(model, rows[: given.rows // 2], settings)
