"""What FLUX.2 [klein] has no use for is refused: by row, or before a job starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from context_diffusion.core.errors import ConfigError, ErrorCode, ModelError, RowError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.records import Failure, Result
from context_diffusion.generation.plan import open_plan
from context_diffusion.models.resolution.resolve import BUNDLED, find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.klein_job import write_job
from support.klein_rows import klein_row, outcomes_of, request_of
from support.klein_variants import with_index, with_text_layers, with_transformer, without_chat_template
from support.local_job import run_job
from support.tiny_diffusers import make_base

ROW = klein_row(1, [(64, 64), (64, 64)], num_inference_steps=1)
# Settings that a distilled model has no use for, and what is said of each.
UNUSED: list[tuple[str, Any, str]] = [
    ("strength", 0.5, "a distilled FLUX.2 [klein] has no use for it, got 0.5; leave it out"),
    ("context_guidance_scale", 2.0, "has no use for it, got 2.0; leave it out"),
    ("controlnet_conditioning_scale", 0.5, "has no use for it, got 0.5; leave it out"),
    ("control_guidance_start", 0.2, "has no use for it, got 0.2; leave it out"),
    ("control_guidance_end", 0.8, "has no use for it, got 0.8; leave it out"),
    ("guidance_scale", 4.0, "has no use for it, got 4.0; leave it out"),
    ("scheduler", "ddim", "choose flow_euler"),
    ("scheduler", "lcm", "choose flow_euler"),
]
GOOD: dict[str, Any] = {"query": "5.png", "context": ["4.webp"]}
# Rows that are wrong in another way, with their code and message.
WRONG: list[tuple[dict[str, Any], ErrorCode, str]] = [
    (
        {"query": "small.png"},
        ErrorCode.INVALID_REFERENCE,
        r"small\.png: 100 x 63 pixels: the model reads references with sides of at least 64 pixels",
    ),
    (
        {"context": ["4.webp", "small.png"]},
        ErrorCode.INVALID_REFERENCE,
        r"small\.png: 100 x 63 pixels: .* sides of at least 64 pixels",
    ),
    (
        {"context": "long.jpg"},
        ErrorCode.INVALID_REFERENCE,
        r"long\.jpg: 1032 x 128 pixels: the model reads references with an aspect ratio of at most 8",
    ),
    (
        {"context": ["4.webp", "0.png", "1.jpg", "2.png"]},
        ErrorCode.TOO_MANY_CONTEXTS,
        "4 contexts, the model takes at most 3",
    ),
    (
        {"context_weights": [1, 1]},
        ErrorCode.INVALID_SETTING,
        "context_weights has 2 values for 1 contexts",
    ),
    (
        {"control_image": "0.png"},
        ErrorCode.INVALID_SETTING,
        "control_image: this model has no ControlNet; it reads the query itself",
    ),
    (
        {"negative_prompt": "grey"},
        ErrorCode.INVALID_SETTING,
        r"negative_prompt: it has no effect without guidance \(a guidance_scale over 1\); leave it out",
    ),
    ({"width": 100}, ErrorCode.INVALID_SETTING, "width: .*multiple of 16, got '100'"),
]
TAKEN: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0},
    {"context": "panorama.png"},
    {"controlnet_conditioning_scale": 1.0, "control_guidance_start": 0.0, "scheduler": "flow_euler"},
]


@pytest.fixture(scope="module")
def rows(folders: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the rows of a job, by id."""
    lines = [GOOD | {"id": f"{name} {value}", name: value} for name, value, _ in UNUSED]
    lines += [GOOD | line | {"id": f"wrong {number}"} for number, (line, _, _) in enumerate(WRONG)]
    lines += [GOOD | line | {"id": f"taken {number}"} for number, line in enumerate(TAKEN)]
    job = write_job(
        tmp_path_factory.mktemp("refusals"),
        str(folders[True]),
        lines,
        settings={"num_inference_steps": 1},
        control="disabled",
    )
    return {row["id"]: row for row in run_job(job)}


@pytest.mark.parametrize(("name", "value", "told"), UNUSED)
def test_a_setting_without_a_use_fails_its_row(
    rows: dict[str, dict[str, Any]], name: str, value: Any, told: str
) -> None:
    row = rows[f"{name} {value}"]
    assert row["error_code"] == ErrorCode.INVALID_SETTING
    assert row["error_message"].startswith(name)
    assert told in row["error_message"]


@pytest.mark.parametrize(("name", "value", "told"), UNUSED)
def test_a_setting_without_a_use_stops_a_job_before_it_starts(
    folders: dict[bool, Path], tmp_path: Path, name: str, value: Any, told: str
) -> None:
    job = write_job(tmp_path, str(folders[True]), [GOOD], settings={name: value})
    with pytest.raises(ConfigError, match=rf"^settings\.{name}.*{re.escape(told)}"):
        plan(job)
    assert not Path(job.output, "plan.json").exists()


@pytest.mark.parametrize(("name", "value", "told"), UNUSED)
def test_a_setting_without_a_use_is_a_wrong_argument_in_python(
    models: Any, name: str, value: Any, told: str
) -> None:
    query, context = ROW.images
    with pytest.raises(ValueError, match=rf"{name}.*{re.escape(told)}"):
        models(True)(query, [context], num_inference_steps=1, **{name: value})


def plan(job: GenerateJob) -> None:
    open_plan(job, Output(job.output, Storage()), Storage())


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_row_says_what_is_wrong(rows: dict[str, dict[str, Any]], number: int) -> None:
    _, code, told = WRONG[number]
    row = rows[f"wrong {number}"]
    assert row["error_code"] == code
    assert re.search(told, row["error_message"]), row["error_message"]


@pytest.mark.parametrize("number", range(len(TAKEN)))
def test_a_good_row_beside_them_is_generated(rows: dict[str, dict[str, Any]], number: int) -> None:
    row = rows[f"taken {number}"]
    assert (row["error_message"], row["status"], row["control"]) == (None, "ok", "disabled")


def test_the_base_variant_takes_guidance_and_names_itself(models: Any) -> None:
    guided = replace(ROW.but(guidance_scale=4.0), negative_prompt="grey")
    [result] = outcomes_of(models(False), [guided])
    assert isinstance(result, Result)
    unguided = request_of(models(False), replace(ROW.but(guidance_scale=1.0), negative_prompt="grey"))
    strong = replace(unguided, settings=unguided.settings.model_copy(update={"strength": 0.5}))
    for request, told in ((unguided, "negative_prompt: .*leave it out"), (strong, r"strength: a FLUX\.2 \[")):
        [(_, failure)] = models(False).generate([request])
        assert isinstance(failure, Failure)
        assert failure.code == ErrorCode.INVALID_SETTING
        assert re.search(told, failure.message)


def test_a_control_map_is_refused_and_none_is_taken(
    models: Any, folders: dict[bool, Path], tmp_path: Path
) -> None:
    told = "control: canny: .* has no ControlNet.*; leave control out"
    job = write_job(tmp_path, str(folders[True]), [GOOD], control="canny")
    with pytest.raises(ConfigError, match=told):
        plan(job)
    query, context = ROW.images
    with pytest.raises(ValueError, match=told):
        models(True)(query, [context], control="canny")
    models(True)(query, [context], control="disabled", num_inference_steps=1)
    plan(write_job(tmp_path, str(folders[True]), [GOOD]))


def test_python_says_what_is_wrong_with_an_image_or_a_size(models: Any) -> None:
    small, long = klein_row(1, [(64, 63), (64, 64)]), klein_row(1, [(64, 64), (513, 64)])
    for row, told in ((small, "64 x 63 pixels: .*at least 64"), (long, "513 x 64 pixels: .*at most 8")):
        with pytest.raises(RowError, match=told) as caught:
            request_of(models(True), row)
        assert caught.value.code == ErrorCode.INVALID_REFERENCE
    with pytest.raises(ValueError, match=r"height: .*multiple of 16, got '72'"):
        request_of(models(True), ROW.but(height=72))


@pytest.mark.parametrize(
    "parts",
    [
        {"controlnet": "{folder}/vae"},
        {"ip_adapter": "{folder}", "ip_adapter_weight_name": "a.safetensors"},
        {"image_encoder": "{folder}/vae"},
        {"vae": "{folder}/vae"},
        {"safety_checker": "{folder}/vae"},
        {"clip_skip": 1},
        {"depth_estimator": "{folder}/vae"},
        {"prompt_chunks": 2},
        {"normalization": "channel"},
    ],
)
def test_parts_of_stable_diffusion_are_refused(folders: dict[bool, Path], parts: dict[str, Any]) -> None:
    folder = str(folders[True])
    named = {key: v.format(folder=folder) if isinstance(v, str) else v for key, v in parts.items()}
    name = next(iter(parts))
    with pytest.raises(ModelError, match=rf"{name} does not apply to FLUX\.2 \[klein\], which {folder} is"):
        ContextDiffusion.from_pretrained({"base": folder, **named}, device="cpu")


@pytest.mark.parametrize("kind", ["stable diffusion", "native"])
@pytest.mark.parametrize("parts", [{"prompt_template": "{prompt}!"}, {"max_reference_pixels": 128**2}])
def test_parts_of_klein_are_refused_by_other_models(tmp_path: Path, parts: dict[str, Any], kind: str) -> None:
    base = make_base(tmp_path) if kind == "stable diffusion" else str(BUNDLED)
    with pytest.raises(ModelError, match=f"{next(iter(parts))} does not apply to .*: leave it out"):
        find_model(Parts.model_validate({"base": base, **parts}))


@pytest.mark.parametrize(
    "template",
    [
        "Render image 1 in the style of {styles}.",
        "{prompt} like {style}",
        "{} {prompt}",
        "{prompt.__class__}",
        "{prompt[0]}",
        "{prompt} {",
        "{prompt} }",
        "{prompt:d}",
        "{prompt!x}",
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(folders: dict[bool, Path], template: str) -> None:
    model = {"base": str(folders[True]), "prompt_template": template}
    with pytest.raises(ModelError, match=rf"prompt_template {re.escape(repr(template))}: "):
        ContextDiffusion.from_pretrained(model, device="cpu")
    values = {"kind": "generate", "manifest": "rows.jsonl", "output": "out", "model": model}
    with pytest.raises(ValidationError, match="prompt_template"):
        GenerateJob.model_validate(values)


@pytest.mark.parametrize("pixels", [128**2 - 1, 2048**2 + 1, 0])
def test_references_have_a_range_of_pixels(pixels: int) -> None:
    with pytest.raises(ValidationError, match="max_reference_pixels"):
        Parts.model_validate({"base": "x", "max_reference_pixels": pixels})


def test_a_folder_that_lacks_what_is_read_says_so_when_it_is_loaded(
    folders: dict[bool, Path], tmp_path: Path
) -> None:
    folder = folders[True]
    wrong = {
        without_chat_template(folder, tmp_path / "a"): "tokenizer of .*/a has no chat template: download",
        with_text_layers(folder, tmp_path / "b", 26): "text encoder of .*/b has 26 layers, .* of layer 27",
        with_transformer(folder, tmp_path / "c", guidance_embeds=True): r"of .*/c reads the guidance scale, "
        r"as that of FLUX\.2 \[dev\]; only FLUX\.2 \[klein\] is supported",
        with_index(folder, tmp_path / "d", _class_name="FluxPipeline"): ".*/d is a FluxPipeline, which has "
        "no backbone here; known are .*Flux2KleinPipeline",
    }
    for copy, told in wrong.items():
        with pytest.raises(ModelError, match=told):
            ContextDiffusion.from_pretrained(str(copy), device="cpu")


def test_a_folder_without_a_component_names_it(folders: dict[bool, Path], tmp_path: Path) -> None:
    copy = with_index(folders[True], tmp_path / "copy")
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"copy.*vae/config\.json"):
        ContextDiffusion.from_pretrained(str(copy), device="cpu")
