"""The image from its draft and what the diffusion model changed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from context_diffusion.core.records import Request
from context_diffusion.engine.embedding_cache import Cache
from context_diffusion.models.conditioning import weighted_contexts
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.draft_image import give_back
from support.tiny import picture, request, tiny_model


def pictures(count: int = 3, side: int = 32) -> torch.Tensor:
    shown = np.stack([picture(number, side, side) for number in range(count)])
    return torch.from_numpy(shown).permute(0, 3, 1, 2) / 255


def detail_of(backbone: NativeBackbone, row: Request) -> dict[str, torch.Tensor]:
    contexts = weighted_contexts(row, backbone.model.context_slots)
    return backbone.drafts.of(row, backbone.branches(row)[-1], contexts, Cache(10**8))[1]


def test_nothing_of_the_draft_is_lost_and_what_was_changed_is_added_in_part() -> None:
    drafts, copies = pictures() * 0.8, pictures().mean((2, 3), keepdim=True).expand(3, 3, 32, 32)
    torch.testing.assert_close(give_back(copies, drafts, copies, 1.0, 1.0), drafts)
    torch.testing.assert_close(give_back(copies, drafts, copies, 0.5, 1.0), (drafts + copies) / 2)
    changed = copies + 0.1
    torch.testing.assert_close(give_back(changed, drafts, copies, 1.0, 0.5), (drafts + 0.05).clamp(0, 1))
    torch.testing.assert_close(give_back(changed, drafts, copies, 0.0, 0.5), changed.clamp(0, 1))


@pytest.mark.parametrize(
    ("told", "share"),
    [
        ({}, 1.0),
        ({"controlnet_conditioning_scale": 0.5}, 0.5),
    ],
)
def test_a_row_is_given_as_much_of_its_draft_as_its_layout_says(told: dict[str, float], share: float) -> None:
    model = dataclasses.replace(tiny_model(), detail_scale=0.8)
    backbone, one = NativeBackbone(model), request(1, contexts=2, **told)
    cache, branches = Cache(10**8), backbone.branches(one)
    finish = backbone.encode(one, branches, cache).finish
    assert finish is not None
    _, detail = backbone.drafts.of(one, branches[-1], weighted_contexts(one, model.context_slots), cache)
    assert detail["share"].item() == pytest.approx(0.8 * share)
    plain = backbone.decode(torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)))
    expected = give_back(plain, **detail)
    torch.testing.assert_close(finish(plain), expected, atol=1e-6, rtol=0)


def test_a_smaller_context_scale_leaves_the_query_more_of_its_look() -> None:
    """It mixed the draft with what the U-Net made of a fainter draft, which was dark and grey."""
    backbone = NativeBackbone(tiny_model())
    rows = {scale: request(1, contexts=2, context_scale=scale) for scale in (0.01, 0.25, 1.0, 2.0)}
    drafts = {scale: backbone.drafts.image_of(row) for scale, row in rows.items()}
    query = torch.from_numpy(rows[1.0].query.copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(drafts[0.25], torch.lerp(query, drafts[1.0], 0.25))
    torch.testing.assert_close(drafts[0.01], query, atol=0.01, rtol=0)
    assert torch.equal(drafts[2.0], drafts[1.0])
    row = rows[0.25]
    finish = backbone.encode(row, backbone.branches(row), Cache(10**8)).finish
    assert finish is not None
    torch.testing.assert_close(finish(detail_of(backbone, row)["copies"]), drafts[0.25])


def test_only_the_ratios_of_weights_matter_however_small() -> None:
    """Weights that float32 has no numbers for failed the row."""
    backbone = NativeBackbone(tiny_model())
    expected = backbone.drafts.image_of(request(1, contexts=2, context_weights=[1.0, 0.5]))
    for scale in (8.0, 2.0**-30, 2.0**-170):
        row = request(1, contexts=2, context_weights=[scale, scale / 2])
        assert torch.equal(backbone.drafts.image_of(row), expected), scale
        assert not torch.stack(list(detail_of(backbone, row).values())[:2]).isnan().any()


def test_without_contexts_or_tones_there_is_no_draft_to_give() -> None:
    backbone = NativeBackbone(tiny_model())
    edges = request(1, contexts=1, control="canny")
    assert is_unchanged(backbone, edges)


def is_unchanged(backbone: NativeBackbone, row: Request) -> bool:
    """Whether the row's last step leaves an image as it is."""
    finish = backbone.encode(row, backbone.branches(row), Cache(10**8)).finish
    assert finish is not None
    image = torch.rand(1, 3, 64, 64)
    return torch.equal(finish(image), image)


def test_a_scale_of_nothing_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = dataclasses.replace(tiny_model(), detail_scale=0.0), request(1, contexts=1)
    backbone = NativeBackbone(model)
    monkeypatch.setattr(model, "decode", None)  # what would be called is not there
    assert is_unchanged(backbone, one)
