"""Layout and style measures on held-out rows, with negative controls and the autoencoder's copy of the true
image as upper bound.

    python tests/benchmarks/bars_layout.py [MODEL] [--rows 256] [--steps 20]

Of 8: the query whose edges the output has, the contexts whose colours it has; its boundaries against the true
picture's (F1 at 2 px), its regions' colours against the truth's (dE2000). Then: one context against three,
their order, and what changes with only the query or only the contexts exchanged. Every row has a seed of its
own and 1 to 3 contexts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars_names import names
from bars_rows import GROUP, Row, given_model, held_out_rows, named, region_distance, request_of, sign_test

from context_diffusion.core.records import Pixels
from context_diffusion.core.settings import Settings
from context_diffusion.evaluation.layout import layout_score
from context_diffusion.evaluation.style import chamfer, palette
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training.data.layouts import Tone
from context_diffusion.training.data.styles import Style, dress
from context_diffusion.training.samples import make
from support.measures import boundary_f1


@torch.no_grad()
def copies(model: NativeModel, images: Sequence[Pixels]) -> list[Pixels]:
    """What the autoencoder makes of them."""
    latents = (model.encode_pixels(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]) for image in images)
    return [(model.decode(z)[0] * 255).round().byte().permute(1, 2, 0).numpy() for z in latents]


def table(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    images = make(model, [request_of(row, i, settings) for i, row in enumerate(rows)])
    blank, few = np.full_like(rows[0].query, 128), rows[: max(GROUP, len(rows) // 4)]
    unstyled = make(model, [request_of(row, i, settings, contexts=(blank,)) for i, row in enumerate(few)])
    truth = [row.truth for row in rows]
    # A shuffled row is held against what the next one of its group should be.
    turned = [rows[i - i % GROUP + (i + 1) % GROUP] for i in range(len(rows))]
    print(
        f"{'':18s}{'layout':>9s}{'boundary F1':>13s}{'palette':>9s}{'dE2000':>8s}"
        f"{'texture':>9s}{'its name':>10s}"
    )
    for name, made, of_query, of_style in (
        ("model", images, rows, rows),
        ("autoencoder", copies(model, truth), rows, rows),
        ("truth", truth, rows, rows),
        ("shuffled query", images, turned, rows),
        ("shuffled context", images, rows, turned),
        ("blank context", unstyled, few, few),
    ):
        print(f"{name:18s}" + line(made, of_query[: len(made)], of_style[: len(made)]), flush=True)


def line(images: list[Pixels], of_query: list[Row], of_style: list[Row]) -> str:
    """The measures of pictures that should have these layouts and these styles."""
    count, colours = len(images), [palette([image]) for image in images]
    shown = [palette(row.contexts[: row.shown]) for row in of_style]
    wanted = [
        a.truth if a is b else dress(a.tone, b.style, np.random.default_rng(i))
        for i, (a, b) in enumerate(zip(of_query, of_style, strict=True))
    ]
    texture, colour = names(
        images, [replace(a, style=b.style) for a, b in zip(of_query, of_style, strict=True)]
    )
    layout = named(lambda i, j: layout_score(images[i], of_query[j].query), count)
    style = named(lambda i, j: -chamfer(colours[i], shown[j]), count)
    boundary = np.mean([boundary_f1(image, true) for image, true in zip(images, wanted, strict=True)])
    far = np.mean(
        [
            region_distance(image, true, row.tone)
            for image, true, row in zip(images, wanted, of_query, strict=True)
        ]
    )
    return f"{layout:9.3f}{boundary:13.3f}{style:9.3f}{far:8.1f}{texture:9.3f}{colour:10.3f}"


def contexts(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    one, three, turned = (
        make(
            model,
            [request_of(row, i, settings, contexts=tuple(pick(row.contexts))) for i, row in enumerate(rows)],
        )
        for pick in (lambda c: c[:1], lambda c: c, lambda c: c[::-1])
    )
    first, second = (
        [region_distance(image, row.truth, row.tone) for image, row in zip(images, rows, strict=True)]
        for images in (one, three)
    )
    better = sum(b < a for a, b in zip(first, second, strict=True))
    told = f"better in {better} of {len(rows)}, p {sign_test(better, len(rows) - better):.1e}"
    print(f"three contexts {np.mean(second):.2f} dE2000, one {np.mean(first):.2f}: {told}")
    same = all(np.array_equal(a, b) for a, b in zip(three, turned, strict=True))
    print(f"three contexts in another order: {'equal bits' if same else 'OTHER BITS'}", flush=True)


def swap(model: NativeModel, rows: list[Row], settings: Settings) -> None:
    """Of pairs of rows: the output with only the contexts, only the query exchanged for the other row's. Same
    seed.

    A texture is edges too, so the true pictures' own ratio stands beside the model's, and a third change, of
    palette alone."""
    pairs = [(rows[i], rows[i + 1], i) for i in range(0, len(rows) - 1, 2)]
    repainted = [replace(a.style, palette=b.style.palette, lut=b.style.lut) for a, b, _ in pairs]
    changes = (
        [{} for _ in pairs],
        [{"contexts": tuple(b.contexts[: b.shown])} for _, b, _ in pairs],
        [
            {"contexts": tuple(dressed(tone, style) for tone in a.context_tones[: a.shown])}
            for (a, *_), style in zip(pairs, repainted, strict=True)
        ],
        [{"query": b.query} for _, b, _ in pairs],
    )
    made = [
        make(model, [request_of(a, i, settings, **more) for (a, _, i), more in zip(pairs, each, strict=True)])
        for each in changes
    ]
    true = [
        [dressed(tone, style) for tone, style in each]
        for each in (
            [(a.tone, a.style) for a, *_ in pairs],
            [(a.tone, b.style) for a, b, _ in pairs],
            [(a.tone, style) for (a, *_), style in zip(pairs, repainted, strict=True)],
            [(b.tone, a.style) for a, b, _ in pairs],
        )
    ]
    for whose, (base, restyled, repainted_ones, moved) in (("the model", made), ("the truth", true)):
        for what, change, small, large in (
            ("edges, by contexts and by query", edge_change, restyled, moved),
            ("edges, by their palette alone and by query", edge_change, repainted_ones, moved),
            (
                "palette, by query and by contexts",
                lambda a, b: chamfer(palette([a]), palette([b])),
                moved,
                restyled,
            ),
        ):
            little, much = (
                np.mean([change(a, b) for a, b in zip(base, images, strict=True)])
                for images in (small, large)
            )
            print(f"{whose}: change of the {what}: {little:.3f}, {much:.3f}: {little / much:.3f}", flush=True)


def edge_change(first: Pixels, second: Pixels) -> float:
    return 1 - layout_score(first, second)


def dressed(tone: Tone, style: Style) -> Pixels:
    return dress(tone, style, np.random.default_rng(1))


if __name__ == "__main__":
    given, model, settings = given_model(__doc__)
    rows = held_out_rows(given.rows, model.image_size)
    table(model, rows, settings)
    contexts(model, rows[: given.rows // 4], settings)
    swap(model, rows[: given.rows // 4], settings)
