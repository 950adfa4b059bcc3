"""Few-step presets: their LoRAs, in the published files' names and keys, come from the hub's cache at their
commits, and a row is the image of diffusers' pipeline with the same LoRA, scheduler, steps and guidance."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from context_diffusion.core.errors import ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.model_parts import PRESETS, Parts
from context_diffusion.core.records import Pixels, Request, Result
from context_diffusion.core.settings import Settings
from context_diffusion.generation.plan import open_plan
from context_diffusion.models.resolution.few_steps import FEW_STEPS, FewSteps
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.diffusers_reference import compare, row
from support.manifests import write_manifest
from support.tiny import picture, tiny_model
from support.tiny_diffusers import SIDE, make_base
from support.tiny_flux2 import save_tiny_klein

WIDTH = {"sd15": 768, "sdxl": 1024}  # of each text encoder
# Layers that the published LoRAs change, of attention, feed-forward and convolutions.
LAYERS = (
    "attn1.to_q", "attn2.to_k", "attn2.to_out.0", "proj_in", "ff.net.0.proj",
    "resnets.0.conv1", "time_emb_proj", "downsamplers.0.conv",
)  # fmt: skip
# Written once more, from the cards: scheduler, what its config is changed by, guidance of the cards' calls.
CARDS: dict[str, tuple[str, dict[str, Any], float]] = {
    "lcm": ("LCMScheduler", {}, 1.0),
    "lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 0.0),
    "hyper": ("DDIMScheduler", {"timestep_spacing": "trailing"}, 0.0),
}
FILES = {
    ("lcm", "sd15"): "latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors",
    ("lcm", "sdxl"): "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors",
    ("lightning", "sdxl"): "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors",
    ("hyper", "sd15"): "ByteDance/Hyper-SD/Hyper-SD15-4steps-lora.safetensors",
    ("hyper", "sdxl"): "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors",
}
PUBLISHED = [pytest.param(*key, id="-".join(key)) for key in FILES]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return bases by family, with text of the published widths and the published bases' schedulers."""

    @cache
    def make(family: str) -> str:
        base = Path(make_base(tmp_path_factory.mktemp(family), xl=family == "sdxl", width=WIDTH[family]))
        name = {"sd15": "PNDMScheduler", "sdxl": "EulerDiscreteScheduler"}[family]
        config = diffusers.DDIMScheduler.load_config(base, subfolder="scheduler")
        changes = {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": True}
        scheduler = getattr(diffusers, name).from_config(config | changes)
        scheduler.save_pretrained(base / "scheduler")
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
        return str(base)

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub out of reach; its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(hub: Path, repo: str, commit: str) -> Path:
    return hub / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def put_lora(hub: Path, published: FewSteps, base: str, std: float = 0.25) -> Path:
    """Write a LoRA for a tiny base to the place of a published one, in its keys, those of kohya's scripts."""
    repo, _, file = published.lora.rpartition("/")
    path = snapshot(hub, repo, published.commit) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    generator = torch.Generator().manual_seed(7)
    weights: dict[str, torch.Tensor] = {}
    for layer_name, layer in unet.named_modules():
        if not layer_name.endswith(LAYERS):
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        out, into, *kernel = layer.weight.shape
        key = f"lora_unet_{layer_name.replace('.', '_')}"
        weights[f"{key}.lora_down.weight"] = torch.randn(4, into, *kernel, generator=generator) * std
        weights[f"{key}.lora_up.weight"] = torch.randn(out, 4, *[1] * len(kernel), generator=generator) * std
        weights[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(weights, path)
    return path


def by_diffusers(base: str, file: Path, few_steps: str, request: Request, xl: bool) -> Pixels:
    """Generate a request as a model card's example does."""
    scheduler, changes, guidance = CARDS[few_steps]
    image_to_image = request.settings.strength is not None
    kind = f"StableDiffusion{'XL' if xl else ''}{'Img2Img' if image_to_image else ''}Pipeline"
    pipe = getattr(diffusers, kind).from_pretrained(base)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"height": SIDE, "width": SIDE}
    if image_to_image:
        query = pipe.image_processor.numpy_to_pil(request.query[None] / np.float32(255))
        arguments = {"image": query, "strength": request.settings.strength}
    [image] = pipe(
        request.prompt,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(request.settings.seed or 0),
        **arguments,
    ).images
    return np.asarray(image)


def request_of(model: ContextDiffusion, seed: int, **settings: Any) -> Request:
    """Return a request with the model's defaults."""
    given = {"seed": seed, **settings}
    [request] = model.requests(
        picture(seed, SIDE, SIDE), [picture(2)], "a misty forest", None, None, "crop", given
    )
    return request


def results_of(model: ContextDiffusion, requests: list[Request]) -> list[Pixels]:
    numbered = [dataclasses.replace(request, id=str(number)) for number, request in enumerate(requests)]
    outcomes = {request.id: outcome for request, outcome in model.generate(numbered)}
    images = []
    for request in numbered:
        outcome = outcomes[request.id]
        assert isinstance(outcome, Result), outcome
        images.append(outcome.image)
    return images


def levels_apart(image: Pixels, other: Pixels) -> int:
    return int(np.abs(image.astype(int) - other.astype(int)).max())


def test_the_published_files() -> None:
    assert {key: preset.lora for key, preset in FEW_STEPS.items()} == FILES
    assert all(len(preset.commit) == 40 for preset in FEW_STEPS.values())


@pytest.mark.parametrize(("few_steps", "family"), PUBLISHED)
def test_a_few_step_preset_is_what_its_card_makes_with_diffusers(
    few_steps: Any, family: Any, bases: Callable[[str], str], hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, xl = bases(family), family == "sdxl"
    file = put_lora(hub, FEW_STEPS[few_steps, family], base)
    model = ContextDiffusion.from_pretrained({"base": base, "few_steps": few_steps}, device="cpu")
    assert "lora" not in capsys.readouterr().err, "every key fits"
    requests = [request_of(model, 1), request_of(model, 2, strength=0.6)]
    assert [request.settings.num_inference_steps for request in requests] == [4, 4]
    for request, image in zip(requests, results_of(model, requests), strict=True):
        reference = by_diffusers(base, file, few_steps, request, xl)
        assert levels_apart(image, reference) <= 1
        assert len(np.unique(image)) > 30, "an image that says something"
    plain = ContextDiffusion.from_pretrained(base, device="cpu")
    [without] = results_of(plain, requests[:1])
    [image] = results_of(model, requests[:1])
    assert levels_apart(image, without) > 20, "the LoRA is seen"


@pytest.mark.parametrize("family", WIDTH)
def test_tcd_with_a_few_step_lora_is_what_diffusers_makes_too(
    family: Any, bases: Callable[[str], str], hub: Path
) -> None:
    """Hyper-SD's and TCD's own cards run it; a row overrides the preset's scheduler, steps and guidance."""
    model = {"base": bases(family)}
    rows = [
        row(1, scheduler="tcd", num_inference_steps=4, guidance_scale=1.0, control=[]),
        row(2, scheduler="tcd", num_inference_steps=8, guidance_scale=3.0, control=[]),
        row(3, scheduler="tcd", num_inference_steps=1, guidance_scale=1.0, control=[]),
        row(4, scheduler="tcd", num_inference_steps=8, guidance_scale=1.0, control=[], strength=0.6),
        row(5, scheduler="lcm", num_inference_steps=8, guidance_scale=2.0, control=[], strength=0.6),
        row(6, scheduler="euler_trailing", num_inference_steps=4, control=[], strength=0.5),
        row(7, scheduler="ddim_trailing", num_inference_steps=2, control=[]),
    ]
    compare(model, rows, xl=family == "sdxl")
    put_lora(hub, FEW_STEPS["hyper", family], bases(family))
    few = ContextDiffusion.from_pretrained(model | {"few_steps": "hyper"}, device="cpu")
    own = request_of(few, 1, scheduler="tcd", num_inference_steps=2, guidance_scale=2.0).settings
    assert (own.scheduler, own.num_inference_steps, own.guidance_scale) == ("tcd", 2, 2.0)


def test_a_resolved_few_step_model_is_itself_when_it_is_resolved_again(
    bases: Callable[[str], str], hub: Path, tmp_path: Path
) -> None:
    """Engines resolve the parts that the plan holds: the LoRA is fused once."""
    base, published = bases("sd15"), FEW_STEPS["hyper", "sd15"]
    file = put_lora(hub, published, base)
    own = tmp_path / "own.safetensors"
    own.write_bytes(file.read_bytes())
    given = Parts.model_validate(
        {"base": base, "few_steps": "hyper", "lora": str(own), "lora_scale": 0.5, "dtype": "float32"}
    )
    planned = find_model(given)
    assert planned.parts
    assert planned.parts.fused_loras == [(str(own), 0.5), (published.lora, 1.0)]
    assert planned.parts.revision == {"ByteDance/Hyper-SD": published.commit}
    stored = Parts.model_validate(json.loads(planned.parts.model_dump_json()))
    assert find_model(stored) == planned
    assert find_model(given, planned.parts.revision) == planned
    assert published.lora in planned.parts.all
    plain = find_model(Parts(base=base))
    assert plain.revision != planned.revision
    other = "b" * 40
    newer = find_model(given.model_copy(update={"revision": {"ByteDance/Hyper-SD": other}}))
    assert newer.parts
    assert newer.parts.revision == {"ByteDance/Hyper-SD": other}
    assert newer.revision != planned.revision


def test_the_preset_of_sdxl_takes_a_few_step_lora_too(
    bases: Callable[[str], str], hub: Path, tmp_path: Path
) -> None:
    """`model: {base: sdxl, few_steps: lightning}`; the other parts stay the preset's."""
    sdxl = PRESETS["sdxl"]
    base = snapshot(hub, sdxl.base, sdxl.revision[sdxl.base])
    shutil.copytree(bases("sdxl"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder = snapshot(hub, "h94/IP-Adapter", sdxl.revision["h94/IP-Adapter"]) / "models" / "image_encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps({"image_size": 32}))
    assert sdxl.vae
    shutil.copytree(base / "vae", snapshot(hub, sdxl.vae, sdxl.revision[sdxl.vae]))
    found = find_model(Parts(base="sdxl", few_steps="lightning"))
    published = FEW_STEPS["lightning", "sdxl"]
    assert found.parts
    assert found.parts.revision == sdxl.revision | {"ByteDance/SDXL-Lightning": published.commit}
    assert found.parts.fused_loras == [(published.lora, 1.0)]
    assert (found.parts.ip_adapter, found.parts.vae) == (sdxl.ip_adapter, sdxl.vae)
    assert found.defaults.settings == published.settings | {
        "context_scale": 0.6,
        "controlnet_conditioning_scale": [0.5],
    }


def test_a_plan_holds_the_loras_commit_and_a_wrong_base_ends_before_there_is_one(
    bases: Callable[[str], str], hub: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "in", 2)
    values = {"kind": "generate", "manifest": manifest, "output": str(tmp_path / "out")}
    model = {"base": bases("sd15"), "few_steps": "lightning"}
    job = GenerateJob.model_validate(values | {"model": model})
    with pytest.raises(ModelError, match=r"few_steps lightning has no LoRA for Stable Diffusion 1\.x"):
        open_plan(job, Output(job.output, Storage()), Storage())
    assert not (tmp_path / "out" / "plan.json").exists()
    job = GenerateJob.model_validate(
        values | {"model": model | {"few_steps": "hyper"}, "settings": {"num_inference_steps": 8}}
    )
    plan = open_plan(job, Output(job.output, Storage()), Storage())
    settings = plan.job.settings
    assert (settings.num_inference_steps, settings.guidance_scale, settings.scheduler) == (
        8,
        1.0,
        "ddim_trailing",
    )
    commits = json.loads((tmp_path / "out" / "plan.json").read_text())["model"]["commits"]
    assert commits == {"ByteDance/Hyper-SD": FEW_STEPS["hyper", "sd15"].commit}
    again = open_plan(job, Output(job.output, Storage()), Storage())
    assert again.model == plan.model
    assert isinstance(plan.job.model, Parts)
    assert find_model(plan.job.model).parts == plan.model.parts


def test_the_presets_settings_replace_the_bases_and_the_context_scale_stays(
    bases: Callable[[str], str], hub: Path
) -> None:
    for (few_steps, family), published in FEW_STEPS.items():
        found = find_model(Parts(base=bases(family), few_steps=few_steps))
        assert found.defaults.settings["context_scale"] == 0.6
        assert published.settings.items() <= found.defaults.settings.items()
        settings = Settings.model_validate(found.defaults.settings)
        assert settings.guidance_scale <= 1, "no guidance"


def with_config(base: str, folder: Path, part: str, **changes: Any) -> str:
    """Return a copy of a base's small files, with a changed config: enough to resolve it."""
    for source in Path(base).rglob("*.json"):
        place = folder / source.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(source.read_text())
    path = folder / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("family", "few_steps", "changes", "told"),
    [
        (
            "sd15",
            "lightning",
            {},
            "few_steps lightning has no LoRA for Stable Diffusion 1.x, which base .* is: it is made for "
            "Stable Diffusion XL; choose lcm or hyper",
        ),
        (
            "sd15",
            "hyper",
            {"cross_attention_dim": 1024},
            r"few_steps hyper is made for Stable Diffusion 1.x \(text of width 768\) and Stable Diffusion XL "
            r"\(text of width 2048\); the U-Net of base .* reads text of width 1024: leave few_steps out",
        ),
        ("sdxl", "lightning", {"cross_attention_dim": 1280}, "reads text of width 1280"),
        ("sd15", "lcm", {"cross_attention_dim": 2048}, "reads text of width 2048"),
        ("sd15", "lcm", {"time_cond_proj_dim": 256}, "distilled to few steps already; leave few_steps out"),
    ],
)
def test_a_base_that_a_preset_was_not_made_for_is_refused_before_any_engine_starts(
    bases: Callable[[str], str],
    hub: Path,
    tmp_path: Path,
    family: str,
    few_steps: Any,
    changes: dict[str, Any],
    told: str,
) -> None:
    base = with_config(bases(family), tmp_path / "base", "unet/config.json", **changes)
    with pytest.raises(ModelError, match=told):
        find_model(Parts(base=base, few_steps=few_steps))


def test_other_kinds_of_models_have_no_few_steps(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "native")
    with pytest.raises(ModelError, match="few_steps does not apply to a native model"):
        find_model(Parts(base=str(tmp_path / "native"), few_steps="lcm"))
    flux2 = save_tiny_klein(tmp_path / "klein")
    with pytest.raises(ModelError, match=r"few_steps does not apply to FLUX\.2 \[klein\]"):
        find_model(Parts(base=str(flux2), few_steps="lcm"))


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"few_steps\s+Input should be 'lcm', 'lightning' or 'hyper'"):
        ContextDiffusion.from_pretrained({"base": "sdxl", "few_steps": "turbo"})


def test_a_lora_that_is_not_in_the_cache_is_named_offline(bases: Callable[[str], str], hub: Path) -> None:
    with pytest.raises(ModelError, match="sdxl_lightning_4step_lora"):
        ContextDiffusion.from_pretrained({"base": bases("sdxl"), "few_steps": "lightning"}, device="cpu")


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_a_latent_consistency_model_has_few_steps_of_its_own(tmp_path: Path, xl: bool) -> None:
    """Its pipeline's defaults in diffusers, and for SDXL those of its card."""
    base = make_base(tmp_path, xl, guidance_width=16)
    wanted = {"num_inference_steps": 4, "guidance_scale": 8.0 if xl else 8.5, "context_scale": 0.6}
    assert find_model(base).defaults.settings == wanted | {"scheduler": "ddim"}, "the base's own scheduler"
    config = "scheduler/scheduler_config.json"
    unknown = with_config(base, tmp_path / "unknown", config, _class_name="PNDMScheduler")
    assert find_model(unknown).defaults.settings == wanted | {"scheduler": "lcm"}


def test_the_pipeline_class_of_published_latent_consistency_models_is_known(tmp_path: Path) -> None:
    base = make_base(tmp_path, guidance_width=16)
    source = diffusers.StableDiffusionPipeline.from_pretrained(base)
    components = source.components | {
        "scheduler": diffusers.LCMScheduler.from_config(source.scheduler.config)
    }
    pipe = diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "lcm")
    model = ContextDiffusion.from_pretrained(str(tmp_path / "lcm"), device="cpu")
    request = request_of(model, 3)
    assert (request.settings.scheduler, request.settings.guidance_scale) == ("lcm", 8.5)
    [image] = results_of(model, [request])
    pipe.set_progress_bar_config(disable=True)
    [reference] = pipe(
        request.prompt, height=SIDE, width=SIDE, generator=torch.Generator().manual_seed(3)
    ).images  # its own steps and guidance
    assert levels_apart(image, np.asarray(reference)) <= 1
    assert len(np.unique(image)) > 30
