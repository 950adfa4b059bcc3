"""Prompts that describe a style and a layout in ordinary words, in several wordings."""

from __future__ import annotations

from context_diffusion.training.data.layouts import FAMILIES, Rng
from context_diffusion.training.data.styles import PALETTES, TEXTURES, Style

# Synonyms; the first word of each list is the generator's own name.
PALETTE_WORDS = {
    "autumn": ["autumn", "fall"],
    "ocean": ["ocean", "sea", "blue"],
    "forest": ["forest", "green", "leafy"],
    "sunset": ["sunset", "dusk"],
    "rose": ["rose", "pink"],
    "ice": ["ice", "icy", "frozen", "winter"],
    "desert": ["desert", "sand", "sandy"],
    "neon": ["neon", "electric"],
    "candy": ["candy", "sweet"],
    "mono": ["mono", "grey", "monochrome"],
    "ember": ["ember", "fire", "red"],
    "moss": ["moss", "olive"],
    "violet": ["violet", "purple", "lavender"],
    "lagoon": ["lagoon", "turquoise", "teal"],
}
TEXTURE_WORDS = {
    "flat": ["flat", "plain", "smooth"],
    "stripes": ["stripes", "striped"],
    "dots": ["dots", "dotted", "spotted"],
    "checks": ["checks", "checked", "chequered"],
    "grain": ["grain", "grainy", "rough"],
    "hatching": ["hatching", "hatched", "lines"],
    "gradient": ["gradient", "shaded", "fading"],
    "brush": ["brush", "brushed", "painted"],
    "glass": ["glass", "mosaic", "faceted"],
    "waves": ["waves", "wavy", "rippled"],
}
THING_WORDS = {
    "regions": ["patches", "shapes"],
    "figures": ["figures", "things"],
    "dead_leaves": ["leaves", "stones"],
    "lines": ["branches", "curves"],
    "grid": ["rows", "windows"],
    "landscape": ["hills", "landscape"],
    "fields": ["clouds", "mist"],
    "solids": ["fruit", "pebbles"],
    "composite": ["scene", "view"],
}
FILLERS = [
    "a",
    "an",
    "the",
    "in",
    "of",
    "with",
    "and",
    "colours",
    "colors",
    "tones",
    "palette",
    "picture",
    "image",
    "texture",
    "over",
    "misty",
]


def vocabulary() -> list[str]:
    words = [
        w for table in (PALETTE_WORDS, TEXTURE_WORDS, THING_WORDS) for names in table.values() for w in names
    ]
    return [*words, *FILLERS]


assert set(PALETTE_WORDS) == set(PALETTES)
assert set(TEXTURE_WORDS) == set(TEXTURES)
assert set(THING_WORDS) == set(FAMILIES)


def describe(rng: Rng, style: Style, family: str, must: str | None = None, held_out: bool = False) -> str:
    """Return a prompt that names some of palette, texture and things.

    must: `palette` or `texture`, which is always named. held_out: use a wording that training never uses."""
    palette = style.palette in PALETTE_WORDS and (must == "palette" or rng.random() < 0.6)
    texture = must == "texture" or rng.random() < 0.6
    thing = str(rng.choice(THING_WORDS[family])) if family in THING_WORDS and rng.random() < 0.4 else ""
    colour = str(rng.choice(PALETTE_WORDS[style.palette])) if palette else ""
    surface = str(rng.choice(TEXTURE_WORDS[style.texture])) if texture else ""
    wordings = [
        f"{surface} {colour} {thing}",
        f"{thing} in {colour} colours {surface}" if colour else f"{surface} {thing}",
        f"a {colour} picture of {thing} with {surface} texture"
        if thing and surface
        else f"{colour} {thing} {surface}",
        f"{colour} tones and {surface} texture" if colour and surface else f"{thing} {colour} {surface}",
    ]
    if held_out:
        wordings = [f"{surface} texture in {colour}" if colour else f"a {surface} picture of {thing}"]
    return " ".join(str(rng.choice(wordings)).split())
