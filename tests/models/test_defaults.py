"""What a model is used with where a job or a call leaves it out; tiny parts stand in the presets' places on a
hub of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from context_diffusion.cli import main
from context_diffusion.core.errors import ConfigError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import PRESETS
from context_diffusion.core.settings import Settings
from context_diffusion.generation.plan import open_plan
from context_diffusion.inputs.control_maps import control_map
from context_diffusion.models.resolution.controlnets import CONTROLNETS
from context_diffusion.models.resolution.defaults import (
    Defaults,
    native_defaults,
    resolved_control,
    resolved_job,
    resolved_settings,
)
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.local_job import run_job
from support.manifests import job_values, write_manifest
from support.tiny import picture
from support.tiny_diffusers import (
    make_base,
    make_controlnet,
    make_image_encoder,
    make_ip_adapter,
    make_safety_checker,
)
from support.tiny_flux2 import save_tiny_klein

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"num_inference_steps": 30, "guidance_scale": 7.5, "scheduler": "dpmpp_2m", "context_scale": 0.6},
    "sdxl": {
        "num_inference_steps": 40,
        "guidance_scale": 5.0,
        "scheduler": "euler",
        "context_scale": 0.6,
        "controlnet_conditioning_scale": [0.5],
    },
    "flux2-klein": {"num_inference_steps": 4, "guidance_scale": 1.0, "scheduler": "flow_euler"},
    "flux2-klein-base": {"num_inference_steps": 50, "guidance_scale": 4.0, "scheduler": "flow_euler"},
}
CONTROL = {"sd15": ["canny"], "sdxl": ["canny"], "flux2-klein": [], "flux2-klein-base": []}
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of presets whose newest one is taken
SCHEDULER = {"sd15": "PNDMScheduler", "sdxl": "EulerDiscreteScheduler"}  # of the published bases
# diffusers' loader, of huggingface_hub 1
LOADER = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")


@pytest.fixture(params=list(PRESETS))
def preset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset's name, its parts in the hub's cache, at its commits, as tiny ones."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    parts, xl = PRESETS[request.param], request.param == "sdxl"
    if request.param.startswith("flux2"):
        own = save_tiny_klein(tmp_path / "klein", distilled=request.param == "flux2-klein")
        put(tmp_path, parts.base, parts.revision, own)
        return request.param
    base = Path(make_base(tmp_path, xl))
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": SCHEDULER[request.param]}))
    adapter = make_ip_adapter(tmp_path, str(base), plus=True, xl=xl)
    file = Path(adapter["ip_adapter"]) / adapter["ip_adapter_weight_name"]
    put(tmp_path, parts.base, parts.revision, base)
    put(tmp_path, parts.controlnets[0], parts.revision, Path(make_controlnet(tmp_path, xl)))
    put(tmp_path, str(parts.image_encoder), parts.revision, Path(make_image_encoder(tmp_path)))
    put(tmp_path, f"{parts.ip_adapter}/{parts.ip_adapter_weight_name}", parts.revision, file)
    if parts.vae:
        put(tmp_path, parts.vae, parts.revision, base / "vae")
    if parts.safety_checker:
        images = [picture(seed) for seed in range(4)]
        put(tmp_path, parts.safety_checker, parts.revision, Path(make_safety_checker(tmp_path, images)))
    return request.param


def put(folder: Path, part: str, revision: dict[str, str], files: Path) -> None:
    owner, name, *inside = part.split("/")
    cache = folder / "hub" / f"models--{owner}--{name}"
    commit = revision.get(f"{owner}/{name}", COMMIT)
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    snapshot = cache / "snapshots" / commit
    place = snapshot.joinpath(*inside)
    place.parent.mkdir(parents=True, exist_ok=True)
    if files.is_file():
        shutil.copy(files, place)
    else:
        shutil.copytree(files, place, dirs_exist_ok=True)


def test_a_job_that_leaves_all_out_is_planned_with_the_presets_own_settings_and_map(
    preset: str, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "in", 2)
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": manifest, "output": str(tmp_path / "out"), "model": preset}
    )
    plan = open_plan(job, Output(job.output, Storage()), Storage())
    assert plan.job.control_kinds == CONTROL[preset]
    planned = json.loads((tmp_path / "out" / "plan.json").read_text())["job"]["settings"]
    assert {name: planned[name] for name in PUBLISHED[preset]} == PUBLISHED[preset]
    if not CONTROL[preset]:
        with pytest.raises(ConfigError, match=r"control: gray: .* has no ControlNet"):
            resolved_job(job.model_copy(update={"control": "gray"}), plan.model.defaults)
        return
    given = job.model_copy(
        update={"control": "gray", "settings": Settings.model_validate({"guidance_scale": 2.0})}
    )
    own = resolved_job(given, plan.model.defaults)
    assert own.control_kinds == ["gray"]
    assert own.settings.guidance_scale == 2.0
    assert own.settings.num_inference_steps == PUBLISHED[preset]["num_inference_steps"]


@LOADER
def test_the_output_records_the_presets_own_settings(preset: str, tmp_path: Path) -> None:
    """Of a row without settings."""
    for number, name in enumerate(("query", "context")):
        Image.fromarray(picture(number)).save(tmp_path / f"{name}.png")
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps({"id": "a", "query": "query.png", "context": ["context.png"]}))
    job = GenerateJob.model_validate(
        {"kind": "generate", "manifest": str(manifest), "output": str(tmp_path / "out"), "model": preset}
    )
    [written] = run_job(job)
    assert written["status"] == "ok", written["error_message"]
    assert {name: written[name] for name in PUBLISHED[preset]} == PUBLISHED[preset]
    assert written["control"] == ("+".join(CONTROL[preset]) or "disabled")


@LOADER
def test_the_python_api_uses_them_too(preset: str) -> None:
    model = ContextDiffusion.from_pretrained(preset, device="cpu")
    query, context = picture(1), picture(2)
    [request] = model.requests(query, [context], None, None, None, "crop", {"seed": 1})
    used = request.settings.model_dump()
    assert {name: used[name] for name in PUBLISHED[preset]} == PUBLISHED[preset]
    assert [control.kind for control in request.controls] == CONTROL[preset]
    for control in request.controls:
        assert np.array_equal(control.pixels, control_map(request.query, control.kind))
    [own] = model.requests(query, [context], None, None, None, "crop", {"num_inference_steps": 3})
    assert own.settings.num_inference_steps == 3
    assert own.settings.guidance_scale == PUBLISHED[preset]["guidance_scale"]
    image = model(query, [context], num_inference_steps=1)
    side = model.backbone.image_size if CONTROL[preset] else query.shape[0]
    assert image.size == (side, side)


def test_presets_have_settings_of_their_own_size_and_controlnets_that_are_known() -> None:
    assert set(PUBLISHED) == set(CONTROL) == set(PRESETS)
    for parts in PRESETS.values():
        assert set(parts.controlnets) <= set(CONTROLNETS)


def test_a_controlnet_of_unknown_kind_must_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"base": make_base(tmp_path), "controlnet": make_controlnet(tmp_path)}
    write_manifest(tmp_path / "in", 2)
    values = job_values(str(tmp_path / "in" / "manifest.parquet"), tmp_path / "out", model=model)
    values.pop("control", None)
    (tmp_path / "job.json").write_text(json.dumps(values))
    for command in ("validate", "run"):
        monkeypatch.setattr("sys.argv", ["context-diffusion", command, str(tmp_path / "job.json")])
        assert main._run() == 2
        assert "set control to canny, gray" in capfd.readouterr().err
    assert not (tmp_path / "out" / "plan.json").exists()
    pipeline = ContextDiffusion.from_pretrained(model, device="cpu")
    with pytest.raises(ValueError, match=r"control: .*controlnet1 was trained on is unknown"):
        pipeline(picture(1), [picture(2)])
    pipeline(picture(1), [picture(2)], control="canny", num_inference_steps=1)


@pytest.mark.parametrize(
    ("given", "controlnets", "expected"),
    [
        (None, (), []),
        ("disabled", ("a",), []),
        ("disabled", (), []),
        (["canny", "gray"], ("a", "b"), ["canny", "gray"]),
        ("canny", (), "1 map.* 0 ControlNet"),
        ("canny", ("a", "b"), "1 map.* 2 ControlNet"),
    ],
)
def test_control_fits_the_models_controlnets(given: Any, controlnets: tuple[str, ...], expected: Any) -> None:
    defaults = Defaults({}, () if not controlnets else None, controlnets)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            resolved_control(defaults, given)
    else:
        assert resolved_control(defaults, given) == expected


def test_what_is_given_goes_before_the_models_and_null_is_given() -> None:
    defaults = Defaults({"context_guidance_scale": 3.0, "num_inference_steps": 7})
    given = Settings.model_validate({"context_guidance_scale": None, "guidance_scale": 2.0})
    settings = resolved_settings(defaults, given)
    assert (settings.context_guidance_scale, settings.num_inference_steps, settings.guidance_scale) == (
        None,
        7,
        2.0,
    )
    assert resolved_settings(defaults, settings) == settings


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "PNDMScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_sde"),
    ],
)
def test_a_base_is_used_with_its_own_scheduler(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    base = make_base(tmp_path)
    file = Path(base) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert find_model(base).defaults.settings["scheduler"] == expected


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [(None, "flow_euler"), ({}, "flow_euler"), ({"prediction_type": "flow_prediction"}, "euler")],
)
def test_a_scheduler_that_does_not_suit_the_model_ends_the_job_before_it_starts(
    tmp_path: Path, config: dict[str, Any] | None, scheduler: str
) -> None:
    """Each row failed with invalid_setting, after the engines had started; validate did not see it."""
    model = "bundled"
    if config is not None:
        model = make_base(tmp_path)
        file = Path(model) / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    defaults = find_model(model).defaults
    job = GenerateJob.model_validate(
        {
            "kind": "generate",
            "manifest": "rows.csv",
            "output": "out",
            "control": "disabled",
            "settings": {"scheduler": scheduler},
        }
    )
    with pytest.raises(ConfigError, match=rf"settings\.scheduler: {scheduler} does not suit a .*; choose "):
        resolved_job(job, defaults)
    row = Settings.model_validate({"scheduler": scheduler})
    assert "does not suit" in (defaults.refusal(row) or "")
    assert defaults.refusal(Settings.model_validate({"scheduler": defaults.schedulers[0]})) is None


def test_the_bundled_model_reads_gray_maps() -> None:
    assert find_model("bundled").defaults == native_defaults(8)
