"""Two systems' pictures of the same rows side by side: paired differences of their scores, and a page to look at.

A row counts once, with the mean of its images: they share query, contexts and prompt.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from context_diffusion.core.errors import RowError
from context_diffusion.core.records import Pixels
from context_diffusion.core.schema import ID
from context_diffusion.evaluation.pairs import Pair, source_key
from context_diffusion.evaluation.scores import worth
from context_diffusion.inputs.image_sources import ImageSource
from context_diffusion.outputs.html_templates import templates

Row = dict[str, Any]
RESAMPLES, CONFIDENCE = 2000, 95  # of the bootstrap; per cent
SHOWN, THUMBNAIL, CONTEXTS = 60, 192, 4  # rows on the page; pixels; contexts of a row


def compared(ours: Sequence[Row], theirs: Sequence[Row], columns: Sequence[str]) -> dict[str, Row]:
    """Of each score column, over the rows that both have: the means, ours less theirs with its bootstrap interval, in how
    many rows ours is better and worse (of a leakage: lower), and the sign test's p. Nothing but `rows` where there are none."""
    told = {}
    for column in columns:
        mine, other = _by_row(ours, column), _by_row(theirs, column)
        shared = [row for row in mine if row in other]
        told[column] = {"rows": len(shared)}
        if shared:
            first, second = (np.array([of[row] for row in shared]) for of in (mine, other))
            told[column] |= _paired(first, second, worth(column, 1) - worth(column, 0))
    return told


def _by_row(rows: Sequence[Row], column: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get(column) is not None:
            found.setdefault(row[ID], []).append(row[column])
    return {row: math.fsum(values) / len(values) for row, values in found.items()}


def _paired(ours: NDArray[np.float64], theirs: NDArray[np.float64], sign: float) -> Row:
    """sign: 1 where more is better."""
    differences = ours - theirs
    better, worse = (int((side * sign * differences > 0).sum()) for side in (1, -1))
    means = {"mean": float(ours.mean()), "compared": float(theirs.mean()), "difference": float(differences.mean())}
    return means | {"interval": bootstrap(differences), "better": better, "worse": worse, "p": sign_test(better, worse)}


def bootstrap(differences: NDArray[np.float64]) -> list[float]:
    """The mean's CONFIDENCE interval by percentiles of resampled rows (Efron 1979); the same rows give the same one."""
    rng, count = np.random.default_rng(0), len(differences)
    means = [differences[rng.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    return [float(edge) for edge in np.percentile(means, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])]


def sign_test(better: int, worse: int) -> float:
    """The chance of so many of one kind or more by a fair coin, both sides; rows that are equal say nothing."""
    count = better + worse

    def chance(k: int) -> float:  # by logarithms: the binomials of many rows have thousands of digits
        return math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2))

    return min(1.0, 2 * math.fsum(chance(k) for k in range(min(better, worse) + 1)))


def page(
    names: tuple[str, str],
    table: dict[str, Row],
    ours: Sequence[tuple[Pair, Row]],
    theirs: Sequence[tuple[Pair, Row]],
    read: Callable[[ImageSource], Pixels],
) -> str:
    """One HTML file that opens without a network: the table, and an even sample of the rows that both have."""
    other = {pair.id: (pair, row) for pair, row in reversed(theirs) if not row.get("error_code")}
    first = {pair.id: (pair, row) for pair, row in reversed(ours) if not row.get("error_code") and pair.id in other}
    shared = [row_id for row_id in dict.fromkeys(pair.id for pair, _ in ours) if row_id in first]
    chosen, shown = shared[:: max(1, -(-len(shared) // SHOWN))], _Thumbnails(read)
    cards = []
    for row_id in chosen:
        (pair, row), (their_pair, their_row) = first[row_id], other[row_id]
        pictures = [("query", shown.of(pair.query)), *(("context", shown.of(one)) for one in pair.contexts[:CONTEXTS])]
        sides = [("A", shown.of(pair.picture), row), ("B", shown.of(their_pair.picture), their_row)]
        cards.append({"id": row_id, "prompt": pair.prompt, "pictures": pictures, "sides": sides})
    template = templates("context_diffusion.evaluation").get_template("compare.html.j2")
    return template.render(names=names, table=table, cards=cards, shared=len(shared), confidence=CONFIDENCE)


class _Thumbnails:
    """Small pictures as data: URLs; contexts repeat, so each is read once."""

    def __init__(self, read: Callable[[ImageSource], Pixels]) -> None:
        self._read, self._known = read, dict[str, str | None]()

    def of(self, source: ImageSource | None) -> str | None:
        """None for a picture that cannot be read."""
        if source is None:
            return None
        if (key := source_key(source)) not in self._known:
            try:
                self._known[key] = _thumbnail(self._read(source))
            except RowError:
                self._known[key] = None
        return self._known[key]


def _thumbnail(pixels: Pixels) -> str:
    image, sink = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(sink, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(sink.getvalue()).decode()
