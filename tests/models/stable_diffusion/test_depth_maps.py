"""Depth maps: what transformers' own pipeline makes of a query, computed by the engine that reads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline as transformers_pipeline

from context_diffusion.core.errors import ConfigError, ErrorCode, JobError, ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.records import Control, Failure, Pixels, Request, Result
from context_diffusion.generation.image_origin import find_origin
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.preview import setting_grid
from context_diffusion.generation.reproduce import reproduce
from context_diffusion.generation.validate import validate_job
from context_diffusion.inputs.control_maps import controls_of
from context_diffusion.models.component_loading import ComponentLoader
from context_diffusion.models.resolution.resolve import BUNDLED, find_model
from context_diffusion.models.stable_diffusion.depth_maps import DepthEstimator, load_depth_estimator
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.diffusers_reference import Model, reference, row
from support.local_job import run_stages
from support.threads import threads_that_switch_often
from support.tiny import picture
from support.tiny_depth import make_depth_anything, make_dpt, make_glpn
from support.tiny_diffusers import SIDE, make_base, make_controlnet, make_image_encoder

CPU = torch.device("cpu")
KINDS = {
    "dpt": make_dpt,
    "relative": make_depth_anything,
    "metric": lambda folder: make_depth_anything(folder, metric=True),
    "glpn": make_glpn,
}
FAR_IS_LARGE = ("metric", "glpn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("depth")


@pytest.fixture(scope="module")
def estimators(folder: Path) -> dict[str, str]:
    """The folder of a model of each kind."""
    return {kind: make(folder) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def model(folder: Path, estimators: dict[str, str]) -> Model:
    net = make_controlnet(folder)
    return {"base": make_base(folder), "controlnet": [net], "depth_estimator": estimators["relative"]}


def without(model: Model) -> Model:
    return {name: part for name, part in model.items() if name != "depth_estimator"}


def load(part: str) -> DepthEstimator:
    return load_depth_estimator(ComponentLoader(Parts(base="base"), CPU), part, CPU)


def smooth(seed: int, width: int, height: int) -> Image.Image:
    small = picture(seed, 64, 64)[::8, ::8]
    return Image.fromarray(small).resize((width, height))


def by_transformers(part: str, image: Image.Image, far_is_large: bool = False) -> Pixels:
    """As (H, W, 3), near is bright."""
    depth = transformers_pipeline("depth-estimation", model=part, device="cpu")(image)["depth"]
    near = np.asarray(depth)
    return np.repeat((255 - near if far_is_large else near)[:, :, None], 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_that_of_transformers_pipeline_and_near_is_bright(
    estimators: dict[str, str], kind: str
) -> None:
    estimator = load(estimators[kind])
    for seed, size in enumerate([(64, 64), (96, 72), (200, 104), (33, 57)]):
        image = smooth(seed, *size)
        ours = estimator(np.asarray(image))
        theirs = by_transformers(estimators[kind], image, kind in FAR_IS_LARGE)
        assert (ours.dtype, tuple(ours.shape)) == (torch.uint8, (1, 3, size[1], size[0]))
        pixels = ours[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(pixels - theirs).max() <= 1
        assert len(np.unique(theirs)) > 50, "a map that says something"


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_a_flat_image_is_all_far(estimators: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Where transformers divides by zero."""
    shutil.copytree(estimators[kind], tmp_path / "flat")
    weights = load_file(tmp_path / "flat" / "model.safetensors")
    head = {name: value * 0 for name, value in weights.items() if name.startswith("head.conv3")}
    assert head
    save_file(weights | head, tmp_path / "flat" / "model.safetensors", {"format": "pt"})
    assert not load(str(tmp_path / "flat"))(picture(1)).any()


def test_a_published_dpt_lacks_weights_that_it_does_not_read(
    estimators: dict[str, str], tmp_path: Path
) -> None:
    """The first fusion layer has no residual. Intel's have the processor's earlier name, too."""
    shutil.copytree(estimators["dpt"], tmp_path / "published")
    weights = load_file(tmp_path / "published" / "model.safetensors")
    unread = [name for name in weights if name.startswith("neck.fusion_stage.layers.0.residual_layer1")]
    assert unread
    for name in unread:
        weights.pop(name)
    save_file(weights, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    file = tmp_path / "published" / "preprocessor_config.json"
    values = json.loads(file.read_text())
    del values["image_processor_type"]
    file.write_text(json.dumps(values | {"feature_extractor_type": "DPTFeatureExtractor"}))
    image = np.asarray(smooth(1, 80, 64))
    assert torch.equal(load(str(tmp_path / "published"))(image), load(estimators["dpt"])(image))


def test_a_dpt_on_dinov2_predicts_distances() -> None:
    from transformers import Dinov2Config, DPTConfig

    from context_diffusion.models.stable_diffusion.depth_maps import predicts_distance

    assert predicts_distance(DPTConfig(backbone_config=Dinov2Config(), is_hybrid=False))
    assert not predicts_distance(DPTConfig(is_hybrid=False))


def test_several_threads_estimate_the_same(estimators: dict[str, str]) -> None:
    estimator = load(estimators["relative"])
    images = [np.asarray(smooth(seed, 64 + 8 * seed, 64)) for seed in range(6)]
    alone = [estimator(image) for image in images]
    with threads_that_switch_often(), ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for ours, again in zip(alone, pool.map(estimator, images), strict=True):
                assert torch.equal(ours, again)


def depth_row(number: int, kinds: tuple[str, ...] = ("depth",), **settings: Any) -> Request:
    one = row(number, control=[], **settings)
    return dataclasses.replace(one, controls=controls_of(one.query, kinds))


def as_given(one: Request, part: str) -> Request:
    """The row with transformers' map as its own."""
    maps = by_transformers(part, Image.fromarray(one.query))
    controls = tuple(Control(c.kind, maps if c.pixels is None else c.pixels) for c in one.controls)
    return dataclasses.replace(one, controls=controls)


def test_rows_with_computed_and_given_maps_in_one_batch_equal_diffusers(
    model: Model, estimators: dict[str, str]
) -> None:
    own = dataclasses.replace(depth_row(3), controls=(Control("depth", picture(9)),))
    rows = [depth_row(1), depth_row(2, size=(48, 64), guidance_scale=1.0), own, depth_row(4, ("canny",))]
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=3)
    outcomes = {one.id: outcome for one, outcome in pipeline.generate(rows, None, 4)}
    for one in rows:
        outcome = outcomes[one.id]
        assert isinstance(outcome, Result), outcome
        _, theirs = reference(without(model), as_given(one, estimators["relative"]), xl=False)
        assert np.abs(outcome.image.astype(int) - theirs).max() <= 1
        [(_, alone)] = list(pipeline.generate([one], None, 4))
        assert isinstance(alone, Result)
        assert np.array_equal(alone.image, outcome.image)


def test_a_query_is_estimated_once_for_several_controlnets_and_images(model: Model, folder: Path) -> None:
    nets = [*model["controlnet"], make_controlnet(folder, seed=2)]
    pipeline = ContextDiffusion.from_pretrained(model | {"controlnet": nets}, device="cpu")
    one = depth_row(1, ("depth", "depth"))
    engine = pipeline.engine()
    batch = [dataclasses.replace(one, index=n) for n in range(3)]
    given = dataclasses.replace(one, index=3, controls=(Control("depth", one.query),) * 2)
    images = [outcome.image for _, outcome in engine.run([*batch, given]) if isinstance(outcome, Result)]
    assert len(images) == 4
    assert engine.cache.misses["depth"] == 1
    assert engine.cache.misses["control0"] == 2, "a given map that equals the query is another one"


def write_rows(folder: Path, own_maps: bool) -> None:
    lines: list[dict[str, Any]] = []
    for number, size in enumerate([(300, 200), (50, 90)]):
        for name, seed in (("query", number), ("map", 30 + number)):
            smooth(seed, *size).save(folder / f"{name}-{number}.png")
        line = {"id": str(number), "query": f"query-{number}.png", "context": [f"query-{number}.png"]}
        lines.append(line | {"seed": 5, "prompt": "a forest"})
    if own_maps:
        lines[1]["control_image"] = ["map-1.png"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))


def job_of(folder: Path, model: Any, **keys: Any) -> GenerateJob:
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "scheduler": "ddim", "context_scale": 1.0}
    return GenerateJob.model_validate(
        {"kind": "generate", "manifest": str(folder / "rows.jsonl"), "output": str(folder / "out"),
         "model": model, "control": "depth", "settings": settings, **keys}
    )  # fmt: skip


def run(job: GenerateJob) -> list[dict[str, Any]]:
    """Run a job's stages in this process. -> the loaded rows."""
    return [row for loaded in run_stages(job) for row in loaded.to_pylist()]


def test_through_a_job_and_again_from_its_image(
    model: Model, estimators: dict[str, str], tmp_path: Path
) -> None:
    write_rows(tmp_path, own_maps=True)
    job = job_of(tmp_path, model)
    assert validate_job(job, 2)["exit"] == 0
    loaded = run(job)
    assert [line["control_images"] == [None] for line in loaded] == [True, False]
    for line in loaded:
        pixels = {
            name: np.frombuffer(image["data"], np.uint8).reshape(SIDE, SIDE, 3)
            for name, image in (("query", line["query_image"]), ("map", line["control_images"][0]))
            if image
        }
        controls = (Control("depth", pixels.get("map")),)
        one = row(5, scheduler="ddim", context_scale=1.0, prompt="a forest", num_inference_steps=2)
        one = dataclasses.replace(one, query=pixels["query"], controls=controls)
        [file] = (tmp_path / "out" / "images").glob(f"*/{line['id']}-0.png")
        _, theirs = reference(without(model), as_given(one, estimators["relative"]), xl=False)
        assert np.abs(np.asarray(Image.open(file)).astype(int) - theirs).max() <= 1
        again = reproduce(find_origin(str(file)), [], None)
        assert again.identical, again.differs
    name, lines = setting_grid(job, [("guidance_scale", [1, 3])], "0")
    assert (name, len(lines)) == ("0", 2)


def test_the_python_api_estimates_depth(model: Model, estimators: dict[str, str]) -> None:
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu")
    query = picture(5, SIDE, SIDE)
    ours = pipeline(
        query, [picture(6)], "a forest", control="depth", seed=5, num_inference_steps=3, scheduler="ddim",
        guidance_scale=4.0,
    )  # fmt: skip
    one = dataclasses.replace(row(5, scheduler="ddim", prompt="a forest"), query=query)
    one = as_given(dataclasses.replace(one, controls=controls_of(query, ["depth"])), estimators["relative"])
    assert np.abs(np.asarray(ours).astype(int) - reference(without(model), one, xl=False)[1]).max() <= 1
    bare = ContextDiffusion.from_pretrained(without(model), device="cpu")
    with pytest.raises(ValueError, match=r"^control: depth needs a depth model, such as model\.depth_est"):
        bare(query, [picture(6)], control="depth")
    [(_, outcome)] = list(bare.generate([depth_row(1)]))
    assert isinstance(outcome, Failure)
    assert outcome.code == ErrorCode.INVALID_SETTING
    assert "depth needs a depth model" in outcome.message


def test_without_an_estimator_rows_must_bring_their_maps(model: Model, tmp_path: Path) -> None:
    write_rows(tmp_path, own_maps=False)
    job = job_of(tmp_path, without(model))
    for check in (
        lambda: open_plan(job, Output(job.output, Storage()), Storage()),
        lambda: validate_job(job, 2),
    ):
        with pytest.raises(ConfigError, match=r"depth needs a depth model, .* which .*rows\.jsonl lacks"):
            check()
    assert not (tmp_path / "out" / "plan.json").exists()
    with pytest.raises(JobError, match=r"row '0' .* invalid_setting: control: depth needs"):
        setting_grid(job, [("guidance_scale", [1, 3])], "0")
    write_rows(tmp_path, own_maps=True)
    checked = validate_job(job, 2)
    assert checked["exit"] == 3
    [problem] = checked["problems"]
    assert (problem["id"], problem["error_code"]) == ("0", ErrorCode.INVALID_SETTING)
    assert [line["error_code"] for line in run(job)] == [ErrorCode.INVALID_SETTING, None]
    assert len(list((tmp_path / "out" / "images").glob("*/*.png"))) == 1


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_column_of_maps_is_seen_in_each_format(model: Model, tmp_path: Path, form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_rows(tmp_path, own_maps=False)
    renamed = {"id": "0", "query": "query-0.png", "context": ["query-0.png"], "maps": ["map-0.png"]}
    if form == "csv":
        cells = [json.dumps(v) if isinstance(v, list) else v for v in renamed.values()]
        quoted = ",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in cells)
        (tmp_path / "rows.csv").write_text(f"{','.join(renamed)}\n{quoted}\n")
    else:
        pq.write_table(pa.Table.from_pylist([renamed]), tmp_path / "rows.parquet")
    job = job_of(tmp_path, without(model), manifest=str(tmp_path / f"rows.{form}"))
    with pytest.raises(ConfigError, match="depth needs a depth model"):
        open_plan(job, Output(job.output, Storage()), Storage())
    named = job.model_copy(update={"columns": {"control_image": "maps"}})
    assert validate_job(named, 1)["exit"] == 0


def test_the_estimator_is_a_part_like_the_others(model: Model, estimators: dict[str, str]) -> None:
    resolved = find_model(Parts.model_validate(model))
    other = find_model(Parts.model_validate(model | {"depth_estimator": estimators["dpt"]}))
    assert resolved.parts
    assert model["depth_estimator"] in resolved.parts.all
    assert len({resolved.revision, other.revision, find_model(Parts(**without(model))).revision}) == 3
    assert resolved.defaults.estimates_depth


def test_a_depth_model_that_is_none_is_refused(
    model: Model, folder: Path, estimators: dict[str, str], tmp_path: Path
) -> None:
    base = model["base"]
    for part, told in (
        (make_image_encoder(tmp_path), r"image_encoder is a CLIPVisionModelWithProjection, expected a trans"),
        (f"{base}/vae", "vae is a AutoencoderKL, expected a transformers model for depth estimation such as"),
        (base, r"config\.json cannot be read"),
        (str(tmp_path / "nothing"), "nothing not found"),
    ):
        with pytest.raises(ModelError, match=told):
            find_model(Parts.model_validate(model | {"depth_estimator": part}))
    with pytest.raises(ModelError, match="depth_estimator does not apply to a native model"):
        find_model(Parts(base=str(BUNDLED), depth_estimator=estimators["dpt"]))
    broken = {name: shutil.copytree(estimators["dpt"], tmp_path / name) for name in ("thin", "blind", "code")}
    weights = load_file(broken["thin"] / "model.safetensors")
    weights.pop("head.head.0.weight")
    save_file(weights, broken["thin"] / "model.safetensors", {"format": "pt"})
    (broken["blind"] / "preprocessor_config.json").unlink()
    unknown = {"image_processor_type": "NoneOfTheirs", "auto_map": {"AutoImageProcessor": "theirs.Processor"}}
    (broken["code"] / "preprocessor_config.json").write_text(json.dumps(unknown))
    for name, told in (
        ("thin", r"1 weights are missing, head\.head\.0\.weight"),
        ("blind", r"depth_estimator .*blind cannot be used"),
        ("code", r"depth_estimator .*code cannot be used"),
    ):
        with pytest.raises(ModelError, match=told):
            ContextDiffusion.from_pretrained(model | {"depth_estimator": str(broken[name])}, device="cpu")
