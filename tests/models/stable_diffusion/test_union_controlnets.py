"""Union ControlNets: a row equals what diffusers' union pipeline makes of it, whatever kinds and rows are in
its batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ControlNetUnionModel
from PIL import Image

from context_diffusion.core.errors import ConfigError, ErrorCode, ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.records import Control, Failure, Pixels, Request, Result
from context_diffusion.generation.plan import open_plan
from context_diffusion.inputs.control_maps import CONTROLS, control_map
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.diffusers_reference import Model, row
from support.launches import calls_of_a_step
from support.local_job import run_stages
from support.threads import threads_that_switch_often
from support.tiny import picture
from support.tiny_diffusers import (
    SIDE,
    make_base,
    make_controlnet,
    make_image_encoder,
    make_ip_adapter,
    make_union_controlnet,
)
from support.union_reference import union_reference


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An XL base with an IP-Adapter, a union ControlNet of each size and a plain one."""
    folder = tmp_path_factory.mktemp("union")
    base = make_base(folder, xl=True)
    return {
        "model": {
            "base": base,
            "image_encoder": make_image_encoder(folder),
            **make_ip_adapter(folder, base, xl=True),
        },
        "union": make_union_controlnet(folder, types=6),
        "promax": make_union_controlnet(folder, types=8, seed=8),
        "plain": make_controlnet(folder, xl=True),
    }


def with_nets(parts: dict[str, Any], *names: str) -> Model:
    return parts["model"] | {"controlnet": [parts[name] for name in names]}


def union_row(number: int, *kinds: str, **settings: Any) -> Request:
    """A row with maps of these kinds; a map that is not computed from the query is another picture."""
    one = row(number, control=[], **settings)
    height, width = one.query.shape[:2]
    controls = [
        Control(kind, control_map(one.query, kind) if kind in CONTROLS else picture(50 + n, height, width))
        for n, kind in enumerate(kinds)
    ]
    return dataclasses.replace(one, controls=tuple(controls))


def images(pipeline: ContextDiffusion, rows: list[Request]) -> dict[str, Pixels]:
    found = {}
    for one, outcome in pipeline.generate(rows, None, 4):
        assert isinstance(outcome, Result), outcome
        found[one.id] = outcome.image
    return found


def compare(model: Model, rows: list[Request], plain: tuple[str, ...] = ()) -> dict[str, Pixels]:
    ours = images(ContextDiffusion.from_pretrained(model, device="cpu"), rows)
    for one in rows:
        theirs = union_reference(model, one, plain)
        assert np.abs(ours[one.id].astype(int) - theirs).max() <= 1, one.id
        assert len(np.unique(theirs)) > 30, "an image that says something"
    return ours


def moved(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_rows_of_all_kinds_in_one_batch_equal_diffusers(parts: dict[str, Any]) -> None:
    rows = [
        union_row(1, "depth"),
        union_row(2, "canny", controlnet_conditioning_scale=0.6, contexts=2),
        union_row(3, "tile", control_guidance_end=0.5, num_inference_steps=4),
        union_row(4, "soft_edges", control_guidance_start=0.3, guidance_scale=1.0, num_inference_steps=5),
        union_row(5, "openpose", controlnet_conditioning_scale=[1.4], negative_prompt="grey"),
        union_row(6, "segment", scheduler="euler", size=(48, 64)),
        union_row(7, "normal", strength=0.7, num_inference_steps=4),
    ]
    model = with_nets(parts, "promax")
    ours = compare(model, rows)
    same_map = dataclasses.replace(rows[0], controls=(Control("normal", rows[0].controls[0].given),))
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu")
    assert moved(images(pipeline, [same_map])["row-1"], ours["row-1"]) > 3, "the control type is heard"
    line_art = dataclasses.replace(rows[1], controls=(Control("lineart", rows[1].controls[0].given),))
    assert moved(images(pipeline, [line_art])["row-2"], ours["row-2"]) == 0, "one type for thin lines"


def test_a_row_has_the_bits_of_its_maps_alone(parts: dict[str, Any]) -> None:
    """diffusers' class attends over the batch, so that the rows of a batch could meet there."""
    pipeline = ContextDiffusion.from_pretrained(with_nets(parts, "union"), device="cpu", cpu_threads=4)
    rows = [union_row(n, kind) for n, kind in enumerate(["depth", "canny", "normal", "depth"], 1)]
    with threads_that_switch_often():
        together = images(pipeline, rows)
    for one in reversed(rows):
        assert moved(images(pipeline, [one])[one.id], together[one.id]) == 0


def test_a_step_of_a_union_costs_what_one_of_a_plain_controlnet_does(parts: dict[str, Any]) -> None:
    """But for its type's embedding, gathered for each lane and added."""
    calls = {
        name: calls_of_a_step(
            ContextDiffusion.from_pretrained(with_nets(parts, name), device="cpu", cpu_threads=1),
            [union_row(1, "canny"), union_row(2, "canny")],
        )
        for name in ("plain", "union")
    }
    assert (calls["union"].copies, calls["union"].reads) == (0, 0)
    assert calls["union"].launches == calls["plain"].launches + 2


def test_two_kinds_are_the_same_union_named_twice_and_loaded_once(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_nets(parts, "union", "union")
    loaded: list[str] = []
    load = ControlNetUnionModel.from_pretrained
    monkeypatch.setattr(
        ControlNetUnionModel, "from_pretrained", lambda name, **own: loaded.append(name) or load(name, **own)
    )
    rows = [
        union_row(1, "depth", "canny"),
        union_row(2, "canny", "depth", controlnet_conditioning_scale=[0.6, 1.2]),
        union_row(3, "canny", "canny", control_guidance_end=0.7),
    ]
    ours = compare(model, rows)
    assert loaded[0] == parts["union"]
    loaded.clear()
    backbone: Any = ContextDiffusion.from_pretrained(model, device="cpu").backbone
    assert loaded == [parts["union"]]
    assert len(backbone.controlnets) == 2
    assert len(backbone.denoisers) == 2, "the U-Net, and the union once"
    one = dataclasses.replace(rows[0], controls=tuple(reversed(rows[0].controls)))
    swapped = images(ContextDiffusion.from_pretrained(model, device="cpu"), [one])
    assert moved(swapped["row-1"], ours["row-1"]) <= 1, "the order of equal scales says nothing"


def test_a_union_beside_a_plain_controlnet(parts: dict[str, Any]) -> None:
    model = with_nets(parts, "plain", "union")
    rows = [
        union_row(1, "gray", "depth"),
        union_row(2, "canny", "canny", controlnet_conditioning_scale=[0.5, 0.8], contexts=2),
    ]
    compare(model, rows, plain=(parts["plain"],))


def test_through_a_job_with_own_maps(parts: dict[str, Any], tmp_path: Path) -> None:
    lines = []
    for number, size in enumerate([(300, 200), (50, 90)]):
        for name, seed in (("query", number), ("map", 30 + number), ("context", 60 + number)):
            Image.fromarray(picture(seed, 64, 96)).resize(size).save(tmp_path / f"{name}-{number}.png")
        line = {"id": str(number), "query": f"query-{number}.png", "context": [f"context-{number}.png"]}
        lines.append(line | {"seed": 5, "prompt": "a forest", "control_image": [f"map-{number}.png"]})
    del lines[1]["control_image"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = job_of(tmp_path, with_nets(parts, "union"), control="depth")
    for loaded in run_stages(job):
        first, second = loaded.to_pylist()
    assert second["error_code"] == ErrorCode.INVALID_SETTING
    assert "control: depth needs a depth model" in second["error_message"]
    query, own = (
        np.frombuffer(image["data"], np.uint8).reshape(SIDE, SIDE, 3)
        for image in (first["query_image"], first["control_images"][0])
    )
    context = np.frombuffer(first["context_images"][0]["data"], np.uint8).reshape(32, 32, 3)
    one = dataclasses.replace(
        row(5, scheduler="ddim", context_scale=1.0, prompt="a forest"),
        query=query,
        controls=(Control("depth", own),),
        contexts=(context,),
    )
    [file] = (tmp_path / "out" / "images").glob("*/0-0.png")
    theirs = union_reference(with_nets(parts, "union"), one)
    assert np.abs(np.asarray(Image.open(file)).astype(int) - theirs).max() <= 1


def job_of(folder: Path, model: Model, **keys: Any) -> GenerateJob:
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": "ddim", "context_scale": 1.0}
    return GenerateJob.model_validate(
        {"kind": "generate", "manifest": str(folder / "rows.jsonl"), "output": str(folder / "out"),
         "model": model, "settings": settings, **keys}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ("gray", r"gray is not a control type .*union7, which takes openpose, depth, .*segment$"),
        ("tile", r"tile is not a control type .*union7"),
        ("none", r"none is not a control type"),
        (
            None,
            r"ControlNet .*union7 was trained on is unknown; set control to .*union7 takes openpose, depth",
        ),
        ("openpose", r"openpose is not computed here: .* column control_image, which .*rows.jsonl lacks"),
        ("depth", r"depth needs a depth model, .*, which .*rows.jsonl lacks"),
        (["canny", "depth"], r"2 map\(s\) .* 1 ControlNet"),
    ],
)
def test_a_kind_that_the_union_lacks_ends_the_job_before_it_starts(
    parts: dict[str, Any], tmp_path: Path, control: Any, told: str
) -> None:
    line = {"id": "a", "query": "q.png", "context": ["q.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    job = job_of(tmp_path, with_nets(parts, "union"), control=control)
    with pytest.raises(ConfigError, match=told):
        open_plan(job, Output(job.output, Storage()), Storage())
    assert not (tmp_path / "out" / "plan.json").exists()


def test_the_python_api(parts: dict[str, Any]) -> None:
    pipeline = ContextDiffusion.from_pretrained(with_nets(parts, "promax"), device="cpu")
    query, context = picture(1), picture(2)
    made = {
        kind: np.asarray(pipeline(query, [context], control=kind, seed=1, num_inference_steps=2))
        for kind in ("canny", "tile")
    }
    assert moved(made["canny"], made["tile"]) > 3
    with pytest.raises(ValueError, match="gray is not a control type"):
        pipeline(query, [context], control="gray")
    with pytest.raises(ValueError, match="lineart is not computed here"):
        pipeline(query, [context], control="lineart")
    wrong = dataclasses.replace(row(1, control=["gray"]), id="wrong")
    [(_, outcome)] = list(pipeline.generate([wrong]))
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.message) == (
        ErrorCode.INVALID_SETTING,
        "control: the union ControlNet has no type for gray",
    )


def test_a_union_as_its_authors_publish_it_is_known_by_its_types(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    """ControlNetPlus' own class has another name; older files name no number of types, which is 6 then."""
    folder = tmp_path / "published"
    shutil.copytree(parts["union"], folder)
    config = json.loads((folder / "config.json").read_text())
    one = union_row(1, "canny")
    for changed in (
        config | {"_class_name": "ControlNetModel_Union"},
        {name: value for name, value in config.items() if name != "num_control_type"},
        config | {"_class_name": "ControlNetModel"},
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        compare(parts["model"] | {"controlnet": [str(folder)]}, [one])


def test_a_union_of_another_base_and_another_model_are_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"controlnet .*union7 does not fit the base: its cross_attention_dim is 64"
    ):
        ContextDiffusion.from_pretrained(
            {"base": make_base(tmp_path), "controlnet": parts["union"]}, device="cpu"
        )
    base = parts["model"]["base"]
    with pytest.raises(ModelError, match="is a AutoencoderKL, expected a ControlNetModel"):
        ContextDiffusion.from_pretrained({"base": base, "controlnet": f"{base}/vae"}, device="cpu")
