"""Dynamic normalisation: every choice trains, saves, loads, and treats its rows one by one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from context_diffusion.core.errors import ModelError
from context_diffusion.core.records import Control, Pixels, Request, Result
from context_diffusion.core.training_job import Architecture, Normalization
from context_diffusion.engine.engine import Engine
from context_diffusion.models.native.backbone import NativeBackbone
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.normalization import STATISTICS, TONES, describe, normalise, restore
from support.tiny import SIZES, make_tiny, picture, request
from support.training_steps import changed_by_a_step

KINDS = ("none", "image", "channel")


def chosen(contexts: str, query: str, statistics: str) -> Architecture:
    choice = Normalization.model_validate({"contexts": contexts, "query": query, "statistics": statistics})
    return SIZES.model_copy(update={"normalization": choice})


def tensor(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def made(model: NativeModel, requests: list[Request]) -> list[Pixels]:
    outcomes = {
        one.id: outcome
        for one, outcome in Engine(NativeBackbone(model), torch.device("cpu"), (4,)).run(requests)
    }
    results = [outcomes[one.id] for one in requests]
    assert all(isinstance(result, Result) for result in results), results
    return [result.image for result in results if isinstance(result, Result)]


# The query's choice and the contexts' don't meet: each pair of a context's choice and a fate of its
# statistics stands
# here once, beside each of the query's.
@pytest.mark.parametrize(
    ("contexts", "statistics", "query"),
    [
        (contexts, statistics, KINDS[(i + j) % 3])
        for i, contexts in enumerate(KINDS)
        for j, statistics in enumerate(("dropped", "token", "restored"))
    ],
)
def test_every_choice_trains_saves_loads_and_makes_a_row_alone_as_among_others(
    contexts: str, statistics: str, query: str, tmp_path: Path
) -> None:
    sizes = chosen(contexts, query, statistics)
    model = make_tiny(sizes)
    assert {"fusion", "image_encoder", "controlnet"} <= changed_by_a_step(model, sizes, tmp_path)
    model.save_pretrained(tmp_path / "model", dtype=torch.float32)
    again = NativeModel.from_pretrained(tmp_path / "model")
    assert again.normalization == sizes.normalization
    constant = np.full((64, 64, 3), 90, np.uint8)
    rows = [
        request(1, contexts=2, num_inference_steps=2),
        request(2, prompt="ocean", guidance_scale=2.0, size=(64, 96), num_inference_steps=2),
        dataclasses.replace(
            request(3, num_inference_steps=2), controls=(Control("gray", constant),), contexts=(constant,)
        ),
    ]
    together = made(model, rows)
    assert [image.shape for image in together] == [(64, 64, 3), (64, 96, 3), (64, 64, 3)]
    for row, image in zip(rows[::2], together[::2], strict=True):
        assert np.array_equal(image, made(again, [row])[0])
    turned = dataclasses.replace(rows[0], contexts=rows[0].contexts[::-1])
    assert np.array_equal(together[0], made(model, [turned])[0])


def test_what_is_measured_is_what_is_removed() -> None:
    images = torch.cat([tensor(picture(3)), tensor(picture(4)) // 3 + 90])
    plain = images.float() / 255
    for kind, axes in (("channel", (2, 3)), ("image", (1, 2, 3))):
        values, mean, std = normalise(images, kind)
        assert values.mean(axes).abs().max() < 1e-5
        assert values.std(axes, correction=0).sub(1).abs().max() < 1e-4
        assert torch.allclose(values * std[..., None, None] + mean[..., None, None], plain, atol=1e-5)
    values, mean, std = normalise(images, "none")
    assert torch.equal(values, plain)
    assert torch.allclose(mean, plain.mean((2, 3)))
    assert torch.allclose(std, plain.std((2, 3), correction=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_picture_stays_finite_and_what_is_bright_or_flat_is_the_same_once_removed(
    kind: str,
) -> None:
    values, _, std = normalise(torch.full((1, 3, 8, 8), 200, dtype=torch.uint8), kind)
    assert torch.isfinite(values).all()
    assert std.abs().max() < 1e-6
    image = tensor(picture(4)) // 4
    first, second = normalise(image, kind)[0], normalise(image * 2 + 60, kind)[0]
    assert ((first - second).abs().max() < 1e-4) == (kind != "none")


def test_restored_statistics_are_the_weighted_mean_of_the_contexts() -> None:
    contexts = torch.cat([tensor(picture(1)) // 4 + 100, tensor(picture(2)) // 8 + 60])
    plain = contexts.float() / 255
    image = torch.rand(1, 3, 32, 48) * 0.2 + 0.4
    moved = restore(image, contexts, torch.tensor([3.0, 1.0]))
    share = torch.tensor([0.75, 0.25])[:, None]
    for wanted, found in (
        ((share * plain.mean((2, 3))).sum(0), moved.mean((2, 3))[0]),
        ((share * plain.std((2, 3), correction=0)).sum(0), moved.std((2, 3), correction=0)[0]),
    ):
        assert torch.allclose(wanted, found, atol=1e-4)
    assert torch.equal(restore(image, contexts, torch.zeros(2)), image)
    assert torch.isfinite(restore(torch.full_like(image, 0.5), contexts, torch.ones(2))).all()


def test_restored_statistics_reach_the_picture() -> None:
    row = request(5, num_inference_steps=2)
    row = dataclasses.replace(
        row, contexts=tuple(context // 8 + 120 for context in row.contexts)
    )  # nothing is cut off
    [image] = made(make_tiny(chosen("channel", "channel", "restored")), [row])
    assert np.abs(image.mean((0, 1)) - row.contexts[0].mean((0, 1))).max() < 1
    assert np.abs(image.std((0, 1)) - row.contexts[0].std((0, 1))).max() < 1


def test_dropped_statistics_leave_a_contexts_tokens_as_they_are() -> None:
    dim, bright = tensor(picture(6)) // 4, tensor(picture(6)) // 4 * 2 + 60
    for statistics, same in (("dropped", True), ("token", False)):
        model = make_tiny(chosen("channel", "channel", statistics))
        with torch.no_grad():
            assert torch.allclose(model.encode_images(dim), model.encode_images(bright), atol=1e-4) == same


def test_an_unknown_choice_in_a_folder_is_told(tmp_path: Path) -> None:
    make_tiny(SIZES).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["normalization"]["query"] = "batch"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"normalization in model_index.json: .*\n?query"):
        NativeModel.from_pretrained(tmp_path)


def test_the_statistics_tell_the_colours_from_dark_to_light() -> None:
    """A gradient from black to blue: the eighths' blue rises evenly, their red is 0; whatever stands beside
    it."""
    ramp = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    ramp[:, 2] = torch.linspace(0, 255, 64).byte()
    told = describe(torch.cat([ramp, tensor(picture(6))]))
    assert told.shape == (2, STATISTICS)
    red, _, blue = (told[0, 6 : 6 + 3 * TONES].view(3, -1) + 2) / 4
    assert torch.allclose(blue, (torch.arange(8) + 0.5) / 8, atol=0.02)
    assert torch.allclose(red, torch.zeros(8), atol=1e-6)
    assert torch.allclose(describe(tensor(picture(6)))[0], told[1], atol=1e-5), "row by row"
    assert torch.allclose(told[0, :30], describe(ramp.flip(3))[0, :30], atol=1e-5), (
        "where a colour is does not count"
    )
