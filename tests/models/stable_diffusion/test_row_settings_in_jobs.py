"""The settings of test_row_settings.py as columns of a manifest: in Parquet and CSV, in OUTPUT and in images'
metadata, generated again from there, and wrong ones before the first shard."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from context_diffusion.core.errors import ConfigError, OutputConflictError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.settings import Settings
from context_diffusion.generation.image_origin import find_origin
from context_diffusion.generation.plan import open_plan
from context_diffusion.generation.preview import axes_of, setting_grid
from context_diffusion.generation.reproduce import reproduce
from context_diffusion.generation.validate import validate_job
from context_diffusion.models.resolution.defaults import flux2_defaults, native_defaults, resolved_settings
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.local_job import run_job
from support.tiny import picture
from support.tiny_diffusers import make_base, make_controlnet, make_image_encoder, make_ip_adapter
from support.tiny_loras import make_lora

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 4.0, "scheduler": "ddim", "context_scale": 1.0}
CONTROL = ["canny", "gray"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder)
    return {
        "base": base,
        "controlnet": [make_controlnet(folder, seed=seed) for seed in (1, 2)],
        "image_encoder": make_image_encoder(folder),
        **make_ip_adapter(folder, base),
        "loras": {"ink": make_lora(folder, base, "ink", 1), "oil": make_lora(folder, base, "oil", 2)},
    }


def write_images(folder: Path) -> None:
    for number in range(3):
        Image.fromarray(picture(number, 64, 64)).save(folder / f"{number}.png")
    left = np.zeros((128, 128), np.uint8)
    left[:, :64] = 255
    Image.fromarray(left).save(folder / "left.png")
    Image.fromarray(255 - left).save(folder / "right.png")
    Image.fromarray(left[:64]).save(folder / "flat.png")


def job_of(folder: Path, model: Any, manifest: str, **keys: Any) -> GenerateJob:
    values = {"kind": "generate", "manifest": str(folder / manifest), "output": str(folder / "out")}
    values |= {"model": model, "control": CONTROL, "settings": SETTINGS}
    return GenerateJob.model_validate(values | keys)


MASKS = ["left.png", "right.png"]
ROW = {"query": "0.png", "context": ["1.png", "2.png"], "prompt": "a misty forest", "seed": 7}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": "ink", "lora_scale": 0.5},
    "blocks": {"context_blocks": {"up": {"block_0": [0.0, 1.0]}}},
    "masks": {"context_masks": MASKS},
    "windows": {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 1.0]},
    "rescaled": {"guidance_rescale": 0.7},
    "unknown": {"lora": "inks"},
    "flat": {"context_masks": ["flat.png", "right.png"]},
    "one mask": {"context_masks": ["left.png"]},
    "no block": {"context_blocks": {"up": {"block_5": 1.0}}},
    "no blocks": {"context_blocks": "styl"},
    "nested": {"context_blocks": '{"a":' * 2000},
    "deep": {"context_blocks": '{"a":' * 300 + "1" + "}" * 300},
    "long": {"lora": "z" * 100_000},
    "half a list": {"context_masks": "[left.png"},
    "three windows": {"control_guidance_end": [0.1, 0.2, 0.3]},
    "one scale": {"controlnet_conditioning_scale": [1.0]},
    "nine": {"context": ["1.png"] * 9},
    "nulls": {"context_blocks": {"up": {"block_0": None, "block_7": None}, "mid": 1.0, "down": float("nan")}},
}
FAILED = {
    "unknown": ("invalid_setting", "lora: 'inks' is not a name of model.loras; did you mean 'ink'?"),
    "flat": ("invalid_mask", "flat.png has 128 x 64 pixels, another aspect ratio than the output's 64 x 64"),
    "one mask": ("invalid_setting", "context_masks has 1 values for 2 contexts"),
    "no block": ("invalid_setting", "up.block_5 is none of the U-Net's blocks with cross-attention"),
    "nested": ("invalid_setting", "context_blocks: is not JSON"),
    "deep": ("invalid_setting", "a.a should be a number from 0 to 10 or a list of them, not a dict"),
    "long": ("invalid_setting", "lora: 'zzz"),
    "half a list": ("invalid_setting", "context_masks is not a JSON list: '[left.png'"),
    "three windows": ("invalid_setting", "control_guidance_end: 3 values for 2 ControlNets"),
    "one scale": ("invalid_setting", "controlnet_conditioning_scale: 1 values for 2 ControlNets"),
    "nine": ("too_many_contexts", "9 contexts, the model takes at most 8"),
    "no blocks": (
        "invalid_setting",
        "context_blocks: should be all, style, layout, style+layout, or a mapping",
    ),
}


def test_each_setting_is_a_column_and_generates_the_same_image_again(model: Any, tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"id": name, **ROW, **own} for name, own in ROWS.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {row["id"]: row for row in run_job(job_of(tmp_path, model, "rows.jsonl"))}
    for name, (code, message) in FAILED.items():
        assert made[name]["error_code"] == code
        assert message in made[name]["error_message"]
        assert len(made[name]["error_message"]) <= 1003
    finished = made.keys() - FAILED.keys()
    assert all(made[name]["status"] == "ok" for name in finished), made
    assert len({made[name]["sha256"] for name in finished}) == len(finished), "each changes the image"
    assert (made["lora"]["lora"], made["lora"]["lora_scale"]) == ("ink", 0.5)
    assert json.loads(made["blocks"]["context_blocks"]) == ROWS["blocks"]["context_blocks"]
    assert made["plain"]["context_blocks"] == "all"
    assert [Path(uri).name for uri in made["masks"]["context_masks"]] == MASKS
    assert made["windows"]["control_guidance_start"] == [0.0, 0.3]
    assert made["plain"]["control_guidance_start"] == [0.0, 0.0]
    assert made["rescaled"]["guidance_rescale"] == 0.7
    for name in finished:
        again = reproduce(find_origin(str(tmp_path / "out" / made[name]["file_name"])), [], None)
        assert again.identical, (name, again.differs)
    # The image of a row is that of the Python API.
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu")
    query, contexts = tmp_path / "0.png", [tmp_path / "1.png", tmp_path / "2.png"]
    masks = [tmp_path / "left.png", tmp_path / "right.png"]
    told: dict[str, Any] = {**SETTINGS, "seed": 7, "control": CONTROL, "num_images": 2}
    first, _ = pipeline(query, contexts, ROW["prompt"], context_masks=masks, **told)
    written = np.asarray(Image.open(tmp_path / "out" / made["masks"]["file_name"]))
    assert np.abs(np.asarray(first).astype(int) - written).max() <= 1


def test_parquet_and_csv_say_the_same(model: Any, tmp_path: Path) -> None:
    """A column of structs in Parquet, of JSON in CSV."""
    write_images(tmp_path)
    blocks: list[Any] = [{"up": {"block_0": [0.0, 1.0]}}, {"down": {"block_1": [0.5]}, "mid": 1.0}]
    kind = pa.struct(
        [
            ("up", pa.struct([("block_0", pa.list_(pa.float64()))])),
            ("down", pa.struct([("block_1", pa.list_(pa.float64()))])),
            ("mid", pa.float64()),
        ]
    )
    rows = [
        {
            "id": str(n),
            **ROW,
            "context_blocks": own,
            "context_masks": MASKS,
            "lora": "oil",
        }
        for n, own in enumerate(blocks)
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "context_blocks"}
    table = pa.table(columns | {"context_blocks": pa.array(blocks, kind)})
    pq.write_table(table, tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        lists = ("context", "context_masks", "context_blocks")
        writer.writerows(row | {name: json.dumps(row[name]) for name in lists} for row in rows)
    digests = []
    for number, manifest in enumerate(("rows.parquet", "rows.csv")):
        job = job_of(tmp_path, model, manifest, output=str(tmp_path / f"out{number}"))
        made = run_job(job)
        assert [row["status"] for row in made] == ["ok", "ok"], made
        digests.append([row["sha256"] for row in made])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 2


def test_validate_finds_rows_that_the_model_refuses(model: Any, tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"id": name, **ROW, **own} for name, own in ROWS.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = validate_job(job_of(tmp_path, model, "rows.jsonl"), len(rows))["problems"]
    found = {problem["id"]: (problem["error_code"], problem["error_message"]) for problem in problems}
    assert found.keys() == FAILED.keys()
    for name, (code, message) in found.items():
        assert code == FAILED[name][0]
        assert FAILED[name][1] in message


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"settings": {"lora": "inc"}}, "settings.lora: 'inc' is not a name of model.loras; did you mean 'ink'?"),
    ({"settings": {"context_blocks": {"up": {"block_9": 1.0}}}}, "settings.context_blocks: up.block_9 is"),
    ({"settings": {"context_blocks": "style"}, "control": CONTROL}, "up.block_1 is none of the U-Net's"),
    ({"settings": {"control_guidance_end": [0.1, 0.2, 0.3]}}, "control_guidance_end: 3 values for 2 "),
    ({"matrix": {"lora": ["ink", "chalk"]}}, "matrix: lora: 'chalk' is not a name of model.loras"),
    ({"matrix": {"control_guidance_end": [[0.5, 1, 1]]}}, "matrix: control_guidance_end: 3 values for"),
    ({"matrix": {"context_blocks": ["all", {"down": {"block_4": 1.0}}]}}, "context_blocks: down.block_4"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), WRONG)
def test_a_wrong_job_ends_before_its_first_shard(
    model: Any, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", **ROW}))
    job = job_of(tmp_path, model, "rows.jsonl", **keys)
    with pytest.raises(ConfigError) as caught:
        open_plan(job, Output(job.output, Storage()), Storage())
    assert message in str(caught.value)
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_blocks": "styles"}, "should be all, style, layout, style+layout, or a mapping"),
        ({"context_blocks": {"up": {"block_1": -1}}}, "up.block_1 should be a number from 0 to 10"),
        ({"context_blocks": {}}, "names no block"),
        ({"context_blocks": {"up": {"block_1": None}}}, "names no block"),
        ({"context_blocks": {"up": {"block_1": True}}}, "not a bool"),
        ({"context_blocks": "{up: 1}"}, "is not JSON"),
        ({"control_guidance_start": [0.1, 0.2], "control_guidance_end": [0.5]}, "_guidance_end: 1 values"),
        ({"control_guidance_start": [0.1, 0.6], "control_guidance_end": 0.5}, "must be below"),
        ({"guidance_rescale": 1.5}, "less than or equal to 1"),
        ({"lora_scale": 11}, "less than or equal to 10"),
        ({"lora": ""}, "at least 1 character"),
    ],
)  # fmt: skip
def test_settings_of_the_wrong_form_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        job_of(tmp_path, "sd15", "rows.jsonl", settings=settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("base", ["bundled", "flux2-klein"])
def test_models_without_them_refuse_the_settings(base: str) -> None:
    defaults = native_defaults() if base == "bundled" else flux2_defaults(True)
    for settings in ({"lora": "ink"}, {"lora_scale": 0.5}, {"context_blocks": "style"}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}: a .* has no use for it"):
            resolved_settings(defaults, Settings.model_validate(settings))


def test_without_an_ip_adapter_masks_and_blocks_are_refused(model: Any, tmp_path: Path) -> None:
    write_images(tmp_path)
    plain = {name: model[name] for name in ("base", "controlnet")}
    rows = [
        {"id": "masks", **ROW, "context_masks": MASKS},
        {"id": "blocks", **ROW, "context_blocks": "style"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = {row["id"]: row for row in run_job(job_of(tmp_path, plain, "rows.jsonl"))}
    assert "this model has no IP-Adapter" in made["masks"]["error_message"]
    assert "a Stable Diffusion without IP-Adapter has no use for it" in made["blocks"]["error_message"]
    pipeline = ContextDiffusion.from_pretrained(plain, device="cpu")
    with pytest.raises(ValueError, match="context_masks: this model has no IP-Adapter"):
        pipeline(picture(1), [picture(2)], control=CONTROL, context_masks=[picture(3)])


def test_a_preview_takes_the_place_of_a_jobs_matrix(model: Any, tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", **ROW}))
    job = job_of(tmp_path, model, "rows.jsonl", matrix={"context_blocks": ["all", {"mid": 1}]})
    _, lines = setting_grid(job, axes_of(["guidance_scale=1,3"]), None)
    assert len(lines[1]) == 2


def test_an_output_with_other_columns_is_refused(model: Any, tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", **ROW}))
    job = job_of(tmp_path, model, "rows.jsonl")
    output = Output(job.output, Storage())
    open_plan(job, output, Storage())
    open_plan(job, output, Storage())
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"columns": "those before"}))
    for change in (False, True):
        with pytest.raises(OutputConflictError, match="whose data/ has other columns"):
            open_plan(job, output, Storage(), accept_change=change)
