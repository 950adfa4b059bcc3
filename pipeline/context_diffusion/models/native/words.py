"""The words of a prompt: names of colours, other words for those of a tokenizer's vocabulary, and words that
have no effect. Knows no torch.

The colours are the eleven basic terms of Berlin and Kay 1969 and common others, as sRGB."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

COLOURS = {
    "black": "0d0d0f", "white": "f7f7f5", "red": "cc1f26", "green": "2f9140", "yellow": "f5d312",
    "blue": "2458c4", "brown": "7a4a24", "orange": "f0801a", "pink": "f08cb0", "purple": "7b2f9e",
    "grey": "828282", "gray": "828282",
    "amber": "f2a60d", "apricot": "f7b27d", "aqua": "2cc8cf", "azure": "3a8ee6", "beige": "dcc7a0",
    "bronze": "94652b", "burgundy": "6e1428", "charcoal": "36383d", "chocolate": "54301a", "copper": "b5653a",
    "coral": "f5785f", "cream": "f5ebc8", "crimson": "b01030", "cyan": "17bcd6", "emerald": "129b62",
    "fuchsia": "d62ab0", "gold": "d9a51e", "golden": "d9a51e", "indigo": "3f2c91", "ivory": "f4f0dc",
    "jade": "2f9f78", "khaki": "b5a86b", "lemon": "f7e74a", "lilac": "bb9bd6", "lime": "8fd321",
    "magenta": "d01c9c", "maroon": "6b1a20", "mauve": "a97b9d", "mint": "97dcb6", "mustard": "cfa01d",
    "navy": "14265c", "ochre": "c08428", "olive": "747a2a", "peach": "f9bd94", "plum": "74305f",
    "ruby": "a8123e", "rust": "a64a1c", "salmon": "f2917c", "sapphire": "1b459c", "scarlet": "dd2a16",
    "sepia": "6e4b2a", "silver": "b4b8bd", "tan": "c49a6c", "teal": "157a7c", "turquoise": "2bb8ae",
    "violet": "7438b8",
}  # fmt: skip
# Before a colour: what is added to its lightness, and the factor of its chroma.
MODIFIERS = {
    "bright": (6.0, 1.2), "dark": (-22.0, 0.9), "deep": (-14.0, 1.1), "light": (18.0, 0.75),
    "muted": (0.0, 0.5), "pale": (22.0, 0.55), "pastel": (24.0, 0.6), "soft": (8.0, 0.7),
    "vivid": (0.0, 1.25),
}  # fmt: skip
# By a word of the vocabulary of models/native/bundled: other words for it.
OTHER_WORDS = {
    "stripes": "stripe bands banded bars barred pinstripe pinstripes pinstriped zebra",
    "dots": "dot polka polkadot polkadots spot spots spotty speckle speckles speckled",
    "checks": "check checker checkers checkered checkerboard chequer chequers chessboard gingham grid grids "
    "plaid squares tartan",
    "grain": "coarse concrete grains gravel gritty leather noise noisy rock rocky sandpaper stone stony",
    "hatching": "canvas cloth crosshatch crosshatched crosshatching engraved engraving etched etching fabric "
    "hatch hatches knitted linen weave woven",
    "lines": "line lined",
    "gradient": "fade faded fades gradients graded ombre shading",
    "brush": "acrylic brushes brushstroke brushstrokes daubs gouache impasto oil paint painterly painting "
    "strokes stroke watercolor watercolour",
    "glass": "crystal crystals facets mosaics polygons shards stained tiled tiles",
    "waves": "ripple ripples rippling undulating wave",
    "flat": "even smoothly solid uniform",
    "autumn": "autumnal", "ocean": "oceanic oceans seas", "forest": "forests", "sunset": "sunsets twilight",
    "mono": "grayscale greyscale monochromatic", "ember": "embers", "fire": "fiery fires flame flames",
    "moss": "mossy", "ice": "frost frosty", "winter": "wintry", "desert": "deserts", "rose": "roses rosy",
    "neon": "fluorescent",
}  # fmt: skip
SYNONYMS = {other: word for word, others in OTHER_WORDS.items() for other in others.split()}
# Words that ask for nothing of their own.
_FUNCTION_WORDS = (
    "a all also am an and are as at be both but by color colored colors colour coloured colours for from has "
    "have hue hues i image images in into is it its like lots made many me mix mixed more much my of on or "
    "other pattern patterned patterns picture pictures please shade shades shape shapes so some style styled "
    "textured texture textures that the their them then these they this those through tint tinted tints to "
    "tone toned tones very we which with you your"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # letters and digits, with apostrophes inside


class NamedColour(NamedTuple):
    """rgb: six hexadecimal digits. lighter: added to its lightness in Lab. chroma: factor of its chroma."""

    rgb: str
    lighter: float = 0.0
    chroma: float = 1.0


class PromptWords(NamedTuple):
    """colours: that the prompt names. text: the prompt in words of the vocabulary, where they have one for
    it. unknown: the words without an effect, each once."""

    colours: tuple[NamedColour, ...]
    text: str
    unknown: tuple[str, ...]


def read_words(prompt: str | None, vocabulary: Container[str]) -> PromptWords:
    """Read a prompt's words. vocabulary: of the model's tokenizer."""
    plain = (
        unicodedata.normalize("NFKC", prompt or "").lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    words = [word.removesuffix("'s") for word in WORD.findall(plain)]
    colours: list[NamedColour] = []
    unknown: list[str] = []
    for place, word in enumerate(words):
        if rgb := _colour_of(word):
            colours.append(_modified(rgb, words[:place]))
        elif not (
            word in vocabulary
            or word in FUNCTION_WORDS
            or _synonym(word, vocabulary)
            or _modifies(words[place:])
        ):
            unknown.append(word)
    text = " ".join(word if word in vocabulary else _synonym(word, vocabulary) or word for word in words)
    return PromptWords(tuple(dict.fromkeys(colours)), text, tuple(dict.fromkeys(unknown)))


def vocabulary_of(folder: Path) -> frozenset[str]:
    """Return the vocabulary of a native model's folder."""
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    return frozenset(tokenizer["model"]["vocab"])


def _colour_of(word: str) -> str | None:
    return COLOURS.get(word) or COLOURS.get(word.removesuffix("s"))


def _synonym(word: str, vocabulary: Container[str]) -> str | None:
    other = SYNONYMS.get(word)
    return other if other is not None and other in vocabulary else None


def _modifies(words: Sequence[str]) -> bool:
    """Return whether words begin with modifiers and then a colour."""
    after = next((word for word in words if word not in MODIFIERS), "")
    return words[0] in MODIFIERS and _colour_of(after) is not None


def _modified(rgb: str, before: Sequence[str]) -> NamedColour:
    """Return a colour with the modifiers that stand directly before it."""
    colour = NamedColour(rgb)
    for word in reversed(before):
        if word not in MODIFIERS:
            break
        lighter, chroma = MODIFIERS[word]
        colour = NamedColour(rgb, colour.lighter + lighter, colour.chroma * chroma)
    return colour
