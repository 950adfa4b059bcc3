"""One's own pictures: what is read, what is shown with what, and what is wrong told by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from context_diffusion.core.errors import ConfigError, ManifestError
from context_diffusion.core.job_file import check_job
from context_diffusion.core.training_job import FinetuneJob
from context_diffusion.training.data.pools import shift_exposure
from context_diffusion.training.data.user_batches import Gallery
from context_diffusion.training.data.user_images import Example, UserImages, read_user_images
from support.job_files import load_job
from support.manifests import write_pictures
from support.user_images import job, write_styles


def read(data: object, **more: Any) -> UserImages:
    return read_user_images(job(data, Path("out"), **more), 64)


def test_a_folder_a_style_every_format_and_no_target_is_its_own_context(tmp_path: Path) -> None:
    data = write_styles(tmp_path / "own", 2, 10)
    (data / "style-0" / "deeper").mkdir()
    shutil.copy(data / "style-0" / "picture-3.bmp", data / "style-0" / "deeper" / "a copy.bmp")
    found = read(data, held_out=0.2)
    assert (found.styles, len(found.pixels), found.skipped) == (2, 20, {}), "a copy is the same picture"
    assert all(pixels.shape == (64, 64, 3) for pixels in found.pixels)
    assert (len(found.training), len(found.validation)) == (16, 4)
    held = {one.target for one in found.validation}
    for one in (*found.training, *found.validation):
        assert one.target not in one.contexts
        assert not set(one.contexts.tolist()) & held, "what is held out is never shown in training"
        assert {k // 10 for k in one.contexts} == {one.target // 10}, "contexts are of the target's style"
    assert read(data).digest == read(data).digest != read(data, held_out=0.0).digest


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_a_manifest_gives_target_contexts_query_and_prompt(tmp_path: Path, form: str) -> None:
    names = write_pictures(tmp_path)
    rows = [
        {
            "picture": names[0],
            "context": [names[1], names[2], names[0]],
            "query": names[3],
            "prompt": "ocean dots",
        },
        {"picture": names[4], "context": [names[1]], "query": None, "prompt": None},
    ]
    path = tmp_path / f"own.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [
            [r["picture"], json.dumps(r["context"]).replace('"', '""'), r["query"] or "", r["prompt"] or ""]
            for r in rows
        ]
        path.write_text(
            "picture,context,query,prompt\n" + "".join(f'{a},"{b}",{c},{d}\n' for a, b, c, d in cells)
        )
    found = read(path, columns={"target": "picture"})
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in names]
    first, second = sorted(found.training, key=lambda one: one.prompt, reverse=True)

    def same(index: int | None, number: int) -> bool:
        return index is not None and np.array_equal(found.pixels[index], pictures[number])

    assert same(first.target, 0)
    assert same(first.query, 3)
    assert [same(k, n) for k, n in zip(first.contexts, (1, 2), strict=True)] == [True, True], (
        "the target itself is left out"
    )
    assert (first.prompt, second.prompt, second.query) == ("ocean dots", "", None)
    assert same(second.target, 4)


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    data = write_styles(tmp_path / "own", 2, 3)
    (data / "style-0" / "notes.txt").write_text("no picture")
    whole = (data / "style-1" / "picture-0.png").read_bytes()
    (data / "style-1" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (data / "style-1" / ".DS_Store").write_text("hidden")
    found = read(data)
    assert len(found.pixels) == 6
    assert sorted(Path(name).name for name in found.skipped) == ["notes.txt", "torn.png"]
    assert all(name in reason for name, reason in found.skipped.items())


def test_a_style_of_one_picture_is_refused_with_its_name_and_what_was_skipped(tmp_path: Path) -> None:
    data = write_styles(tmp_path / "own", 3, 2)
    (data / "style-1" / "picture-0.png").write_text("no picture")
    shutil.copy(data / "style-2" / "picture-0.png", data / "style-2" / "picture-1.jpg")
    with pytest.raises(ManifestError, match=r"style-1 \(1 of 2 files\), style-2 \(1 of 2 files\)") as told:
        read(data)
    assert "style-0" not in str(told.value)
    assert "picture-0.png" in str(told.value)


def test_a_wrong_place_is_told(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "flat")
    with pytest.raises(ManifestError, match="has no sub-folders"):
        read(tmp_path / "flat")
    (tmp_path / "flat" / "own.jsonl").write_text(json.dumps({"image": names[0]}) + "\n")
    with pytest.raises(ManifestError, match=r"did you mean the manifest .*own.jsonl"):
        read(tmp_path / "flat")
    with pytest.raises(ManifestError, match=r"none of the 1 rows.*\n.*no readable target"):
        read(tmp_path / "flat" / "own.jsonl")
    (tmp_path / "flat" / "own.csv").write_text("image,context\na,b\n")
    with pytest.raises(ManifestError, match="no column target among image, context"):
        read(tmp_path / "flat" / "own.csv")
    with pytest.raises(ManifestError, match="there is no such manifest"):
        read(tmp_path / "nowhere")


def test_a_manifest_reads_only_what_it_may(tmp_path: Path) -> None:
    [elsewhere] = write_pictures(tmp_path / "elsewhere", 1)
    names = write_pictures(tmp_path / "here", 2)
    rows = [
        {"target": names[0], "context": names[1]},
        {"target": f"../elsewhere/{elsewhere}", "context": names[1]},
    ]
    path = tmp_path / "here" / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path)
    assert len(found.training) == 1
    assert any(reason.startswith("forbidden_uri") for reason in found.skipped.values())
    assert len(read(path, allow=[str(tmp_path)]).training) == 2


def test_unknown_keys_are_told_with_the_nearest() -> None:
    values = {"kind": "finetune", "data": "d", "output": "o"}
    assert isinstance(check_job(values), FinetuneJob)
    assert isinstance(load_job(str(Path(__file__).parents[2] / "jobs" / "finetune.yaml")), FinetuneJob)
    with pytest.raises(ConfigError, match="did you mean 'controls'"):
        check_job(values | {"control": ["gray"]})
    with pytest.raises(ConfigError, match=r"diffusion.minute: unknown key; did you mean 'minutes'"):
        check_job(values | {"diffusion": {"minute": 3}})
    with pytest.raises(
        ConfigError, match=r"workers x accumulate \(34\) must not exceed diffusion.batch_size \(32\)"
    ):
        check_job(values | {"workers": 2, "diffusion": {"accumulate": 17}})
    with pytest.raises(ConfigError, match="expected one of target, context, query, prompt"):
        check_job(values | {"columns": {"picture": "image"}})


def test_a_query_made_from_the_target_knows_its_tones_and_nothing_of_its_colours() -> None:
    def two_tones(light: tuple[int, int, int], dark: tuple[int, int, int]) -> Any:
        picture = np.empty((64, 64, 3), np.uint8)
        picture[:, :32], picture[:, 32:] = light, dark
        return picture

    red, green = two_tones((200, 30, 30), (10, 10, 200)), two_tones((20, 110, 90), (60, 20, 20))
    other = two_tones((20, 110, 90), (200, 200, 200))
    gallery = Gallery(
        [red, green, other],
        [],
        ["none"],
        torch.empty(0),
        None,
        torch.empty(0),
        lambda *_: (torch.empty(0),) * 2,
    )

    def query(target: int, seed: int) -> Any:
        return gallery.query(Example(target, np.array([2])), np.random.default_rng(seed))

    for seed in range(6):
        assert np.array_equal(query(0, seed), query(1, seed)), "equal tones, other colours"
        assert not np.array_equal(query(0, seed), query(2, seed)), "other tones"
        own = gallery.query(Example(0, np.array([2]), query=1), np.random.default_rng(seed))
        assert np.array_equal(own, shift_exposure(np.random.default_rng(seed), green)), (
            "a query of one's own is taken"
        )
    coloured = [np.ptp(query(0, seed).astype(int), axis=2).max() > 20 for seed in range(12)]
    assert 2 < sum(coloured) < 10, "some are grey, some wear another style's colours"
