"""A checkpoint in one file, in the original keys: the images of its folder and of diffusers' own loader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from context_diffusion.cli.doctor import is_cached
from context_diffusion.cluster.submit import local_paths
from context_diffusion.core.errors import ModelError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import absolute
from context_diffusion.core.model_parts import PRESETS, Parts
from context_diffusion.generation.plan import open_plan
from context_diffusion.models.component_loading import check_weights
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.outputs.output_folder import Output
from context_diffusion.pipeline import ContextDiffusion
from context_diffusion.storage.filesystem import Storage
from support.diffusers_reference import Model, compare, made, reference, row
from support.hub_server import COMMIT, hub_of
from support.local_job import run_job
from support.manifests import write_manifest
from support.original_format import make_published_base, original_weights, save_original
from support.tiny import picture
from support.tiny_diffusers import SIDE, make_controlnet, make_image_encoder, make_ip_adapter

KINDS = [pytest.param(False, id="sd15"), pytest.param(True, id="sdxl")]
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """-> the `model:` mapping of a kind: a file and the folder that it was made of as its configuration."""

    @cache
    def make(xl: bool) -> Model:
        folder = tmp_path_factory.mktemp("checkpoints")
        base = make_published_base(folder, xl)
        return {"base": save_original(base, folder / "merge.safetensors", xl), "config": base}

    return make


def save_lora(file: Path, base: str) -> str:
    torch.manual_seed(7)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    weights = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            outputs, inputs = module.weight.shape
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, inputs) / inputs**0.5
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(outputs, 2) * 0.3
    save_file(weights, file)
    return str(file)


@pytest.mark.parametrize(
    ("xl", "open_clip"), [(False, False), (False, True), (True, False)], ids=["1.x", "2.x", "xl"]
)
def test_the_files_of_these_tests_are_read_by_diffusers(tmp_path: Path, xl: bool, open_clip: bool) -> None:
    base = make_published_base(tmp_path, xl)
    file = save_original(base, tmp_path / "model.safetensors", xl, open_clip)
    kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    whole = kind.from_pretrained(base)
    loaded = kind.from_single_file(file, config=base, local_files_only=True)
    for name, component in whole.components.items():
        if isinstance(component, torch.nn.Module):
            theirs = loaded.components[name].state_dict()
            assert theirs.keys() == component.state_dict().keys()
            assert all(torch.equal(value, theirs[key]) for key, value in component.state_dict().items()), name


@pytest.mark.parametrize("xl", KINDS)
def test_a_file_makes_the_images_of_its_folder(models: Any, xl: bool) -> None:
    """To the last bits alone: a CPU's sums follow where in memory a weight begins, which is its place in the
    file."""
    model = models(xl)
    rows = [row(1, control=[], scheduler="euler"), row(2, control=[], guidance_scale=1.0)]
    ours = made(model, rows)
    for id, (latents, image) in made({"base": model["config"]}, rows).items():
        torch.testing.assert_close(ours[id][0], latents, rtol=1e-4, atol=1e-4)
        assert np.abs(ours[id][1].astype(int) - image).max() <= 1
    assert all(torch.equal(ours[id][0], latents) for id, (latents, _) in made(model, rows).items())


@pytest.mark.parametrize("xl", KINDS)
def test_a_row_is_what_diffusers_makes_of_the_file_with_all_parts(
    models: Any, tmp_path: Path, xl: bool
) -> None:
    model = models(xl)
    parts = {
        **model,
        "controlnet": [make_controlnet(tmp_path, xl, seed) for seed in (1, 2)],
        "image_encoder": make_image_encoder(tmp_path),
        **make_ip_adapter(tmp_path, model["config"], xl=xl),
    }
    rows = [row(1, contexts=2), row(2, scheduler="dpmpp_2m", negative_prompt="grey"), row(3, strength=0.6)]
    compare(parts, rows, xl)
    compare(model, [row(4, control=[], scheduler="euler")], xl)
    with_lora = model | {"lora": save_lora(tmp_path / "ink.safetensors", model["config"])}
    plain = row(5, control=[], scheduler="ddim")
    compare(with_lora, [plain], xl)
    changed = made(with_lora, [plain])[plain.id][1].astype(int) - made(model, [plain])[plain.id][1]
    assert np.abs(changed).max() > 10


@pytest.mark.parametrize("xl", KINDS)
def test_a_file_of_half_precision_runs_in_float32_on_a_cpu(models: Any, tmp_path: Path, xl: bool) -> None:
    config = models(xl)["config"]
    file = save_original(config, tmp_path / "half.safetensors", xl, dtype=torch.float16)
    model = {"base": file, "config": config}
    backbone: Any = ContextDiffusion.from_pretrained(model, device="cpu").backbone
    assert {weight.dtype for net in (backbone.unet, backbone.vae) for weight in net.parameters()} == {
        torch.float32
    }
    compare(model, [row(1, control=[])], xl)
    half: Any = ContextDiffusion.from_pretrained(model | {"dtype": "float16"}, device="cpu").backbone
    assert half.dtype == torch.float16


def test_a_part_replaces_that_of_the_file(models: Any, tmp_path: Path) -> None:
    """A checkpoint without a VAE needs one."""
    model = models(False)
    other = make_published_base(tmp_path / "other")
    weights = {
        key: value
        for key, value in original_weights(model["config"]).items()
        if not key.startswith("first_stage_model.")
    }
    save_file(weights, tmp_path / "novae.safetensors")
    without = model | {"base": str(tmp_path / "novae.safetensors")}
    with pytest.raises(ModelError, match=r"novae\.safetensors has no VAE: name one"):
        find_model(Parts(**without))
    vae = f"{other}/vae"
    one = row(1, control=[])
    ours = made(without | {"vae": vae}, [one])[one.id][1].astype(int)
    assert np.abs(ours - made({"base": model["config"], "vae": vae}, [one])[one.id][1]).max() <= 1


def test_stable_diffusion_2_needs_a_configuration_that_says_its_prediction(
    models: Any, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    shutil.copytree(models(False)["config"], config)
    file = save_original(str(config), tmp_path / "v2.safetensors", open_clip=True)
    with pytest.raises(ModelError, match=r"is a Stable Diffusion 2\.x checkpoint, whose versions differ"):
        find_model(file)
    scheduler = config / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(values | {"prediction_type": "v_prediction"}))
    compare({"base": file, "config": str(config)}, [row(1, control=[], scheduler="euler")], xl=False)


def test_a_file_that_says_v_prediction_is_not_run_as_another(models: Any, tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(models(True)["config"], config)
    file = str(tmp_path / "vpred.safetensors")
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    save_file(original_weights(str(config), xl=True) | marks, file)
    told = r'v_pred, ztsnr say prediction_type: "v_prediction", rescale_betas_zero_snr: true: set `config:`'
    with pytest.raises(ModelError, match=told):
        find_model(Parts(base=file, config=str(config)))
    scheduler = config / "scheduler" / "scheduler_config.json"
    wanted = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    wanted |= {"timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | wanted))
    compare({"base": file, "config": str(config)}, [row(1, control=[], scheduler="ddim")], xl=True)


def test_what_is_resolved_is_resolved_again_to_the_same(models: Any, tmp_path: Path) -> None:
    model = models(False)
    resolved = find_model(Parts(**model))
    assert resolved.parts
    assert (resolved.kind, resolved.image_size, resolved.licence) == ("sd", SIDE, None)
    again = find_model(Parts.model_validate(json.loads(resolved.parts.model_dump_json())))
    assert (again.revision, again.parts) == (resolved.revision, resolved.parts)
    other = save_original(model["config"], tmp_path / "a.safetensors", dtype=torch.bfloat16)
    shutil.copy(other, tmp_path / "b.safetensors")
    before = find_model(Parts(base=other, config=model["config"])).revision
    shutil.copy(model["base"], other)
    assert find_model(Parts(base=other, config=model["config"])).revision != before
    config = tmp_path / "config"
    shutil.copytree(model["config"], config)
    small = find_model(Parts(base=other, config=str(config))).revision
    (config / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert find_model(Parts(base=other, config=str(config))).revision == small, "weights there are not read"
    text = (config / "model_index.json").read_text()
    (config / "model_index.json").write_text(f"{text}\n")
    assert find_model(Parts(base=other, config=str(config))).revision != small


def test_a_job_of_a_file_is_planned_and_run(models: Any, tmp_path: Path) -> None:
    model = models(False)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "scheduler": "ddim"}
    values = {"kind": "generate", "manifest": write_manifest(tmp_path / "in", 2), "model": model}
    values |= {"output": str(tmp_path / "out"), "settings": settings}
    job = GenerateJob.model_validate(values)
    output = Output(job.output, Storage())
    open_plan(job, output, Storage())
    assert output.read_plan()["model"]["revision"] == find_model(Parts(**model)).revision
    assert len(run_job(job)) == 2
    files = list((tmp_path / "out" / "images").glob("*/*.png"))
    assert len(files) == 2
    assert all(len(np.unique(np.asarray(Image.open(file)))) > 30 for file in files)


def test_relative_paths_of_a_model_are_made_absolute_and_named(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(models(False)["base"], tmp_path / "merge.safetensors")
    shutil.copytree(models(False)["config"], tmp_path / "config")
    values = {"kind": "generate", "manifest": "s3://rows/a.jsonl", "output": "s3://out/a"}
    for model in ("merge.safetensors", {"base": "merge.safetensors", "config": "config"}):
        job = absolute(GenerateJob.model_validate(values | {"model": model}))
        names = ["merge.safetensors", "config"] if isinstance(model, dict) else ["merge.safetensors"]
        assert local_paths(job, "http://head:8265") == [str(tmp_path / name) for name in names]
        assert local_paths(job, "http://127.0.0.1:8265") == []
    assert find_model(Parts(base="merge.safetensors", config="config")).kind == "sd"


def test_planning_a_file_needs_no_torch(models: Any) -> None:
    code = f"""if True:
        import sys
        from context_diffusion.core.model_parts import Parts
        from context_diffusion.models.resolution.resolve import find_model
        assert find_model(Parts(**{models(True)!r})).kind == "sdxl"
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def hub(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """A hub with the base of sd15, which is the tiny one here, and a file that someone made of it."""
    base = PRESETS["sd15"].base
    shutil.copytree(models(False)["config"], tmp_path / "hub" / base)
    folder = tmp_path / "hub" / "someone" / "merges" / "v2"
    folder.mkdir(parents=True)
    shutil.copy(models(False)["base"], folder / "merge.safetensors")
    with hub_of(tmp_path / "hub") as (endpoint, fetched):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield fetched


def test_a_file_on_the_hub_is_loaded_at_its_commit_with_the_configuration_of_sd15(
    models: Any, hub: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, preset = "someone/merges/v2/merge.safetensors", PRESETS["sd15"]
    planned = find_model(name)
    assert planned.parts
    assert planned.parts.config == preset.base
    assert planned.parts.revision == {
        "someone/merges": COMMIT,
        preset.base: preset.revision[preset.base],
    }
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "planning fetches no weights"
    assert not is_cached(name, planned.parts.revision)
    one = row(1, control=[])
    theirs = reference(models(False), one, xl=False)[1]
    assert np.abs(made(planned.parts.model_dump(), [one])[one.id][1].astype(int) - theirs).max() <= 1
    weights = [file for file in hub if file.endswith(".safetensors")]
    assert weights == [name]
    assert is_cached(name, planned.parts.revision)
    before = hub.copy()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = find_model(name, planned.parts.revision)
    assert (again.revision, again.parts) == (planned.revision, planned.parts)
    pinned = {"base": name, "revision": {"someone/merges": COMMIT}}
    assert np.array_equal(made(pinned, [one])[one.id][1], made(models(False), [one])[one.id][1])
    assert hub == before


def test_a_local_file_needs_the_network_once_or_a_folder(
    models: Any, hub: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = models(False)["base"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = r"which is not in the cache: set model: \{base: \.\.\., config: FOLDER\} .*HF_HUB_OFFLINE is set"
    with pytest.raises(ModelError, match=told):
        find_model(file)
    assert find_model(Parts(base=file, config=models(False)["config"])).kind == "sd"
    assert not hub, "a folder needs no network"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = find_model(file)
    assert not [name for name in hub if name.endswith(".safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(file).revision == online.revision
    assert ContextDiffusion.from_pretrained(file, device="cpu").backbone.image_size == SIDE


def test_a_file_that_the_hub_does_not_have_is_named(hub: Counter[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"someone/merges/none\.safetensors: cannot download its header"):
        find_model("someone/merges/none.safetensors")
    (tmp_path / "hub" / "someone" / "merges" / "text.safetensors").write_text("no weights at all")
    with pytest.raises(ModelError, match=r"text\.safetensors is damaged or not a safetensors file"):
        find_model("someone/merges/text.safetensors")


def conv(channels: int) -> tuple[int, ...]:
    return (32, channels, 3, 3)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (2, 2)}, r"a LoRA: use model: \{base: \.\.\., lora"),
        ({"unet.down_blocks.0.attn.to_q.lora_A.weight": (2, 2)}, "is a LoRA"),
        ({"control_model.input_hint_block.0.weight": (2, 2), FIRST: conv(4)}, "is a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (2, 2)}, "is a ControlNet"),
        ({"ip_adapter.1.to_k_ip.weight": (2, 2)}, "is an IP-Adapter"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (2,)}, "a FLUX checkpoint"),
        ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (2, 2)}, "a FLUX checkpoint"),
        ({f"{UNET}single_stream_modulation.lin.weight": (2, 2)}, r"a FLUX\.2 checkpoint"),
        ({f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": (2, 2)}, "a Stable Diffusion 3 checkpoint"),
        ({"edm_mean": (4,), FIRST: conv(4)}, r"Playground v2\.5"),
        ({"decoder.conv_in.weight": conv(4)}, "a VAE alone"),
        ({"clip_g": (2, 1280), "clip_l": (2, 768)}, "a textual inversion embedding"),
        ({"down_blocks.0.resnets.0.conv1.weight": conv(4)}, "one component in diffusers'"),
        ({"input_blocks.0.0.weight": conv(4)}, "a diffusion model only, as in ComfyUI's unet folder"),
        ({FIRST: conv(4), f"{UNET}out.2.weight": conv(4)}, "a diffusion model only"),
        ({FIRST: conv(9), CLIP: (77, 768)}, "an inpainting model, whose U-Net reads 9 channels"),
        ({FIRST: conv(8), CLIP: (77, 768)}, "an instruct-pix2pix model"),
        (
            {FIRST: conv(4), "conditioner.embedders.0.model.text_projection": (2, 2)},
            "an SDXL refiner, which cannot generate alone",
        ),
        (
            {FIRST: conv(4), "cond_stage_model.transformer.embeddings.position_embedding.weight": (2, 2)},
            "a text encoder in keys that diffusers' loader does not read",
        ),
        ({FIRST: conv(4), CLIP: (77, 768)}, "has no VAE: name one"),
        ({"bias": (2,), "weight": (2, 2)}, "it has no U-Net; its first keys are bias, weight"),
        ({}, "it has no U-Net; its first keys are none"),
    ],
)
def test_another_kind_of_file_is_called_what_it_is(
    shapes: dict[str, tuple[int, ...]], told: str, tmp_path: Path
) -> None:
    file = tmp_path / "thing.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(ModelError, match=rf"model: .*thing\.safetensors .*{told}"):
        find_model(str(file))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "a pickle under another name"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle under another name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"GGUF\x03\x00\x00\x00\x01\x00", "a GGUF file"),
        (b"a text that was renamed", "damaged or not a safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{'not': 'json'}", "damaged or not a safetensors file"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "damaged or not a safetensors file"),
        (b"\x0b\x00\x00\x00\x00\x00\x00\x00" + b'{"a": null}', "damaged or not a safetensors file"),
        (b"", "damaged or not a safetensors file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_when_the_job_is_planned(
    data: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=rf"model\.safetensors is .*{told}"):
        find_model(str(tmp_path / "model.safetensors"))


def test_a_wrong_path_or_configuration_says_what_to_do(models: Any, tmp_path: Path) -> None:
    model = models(False)
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    shutil.copy(model["base"], tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("rb+") as file:
        file.truncate(100_000)
    folder = tmp_path / "part"
    shutil.copytree(model["config"], folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "vae" / "config.json").unlink()
    broken = tmp_path / "broken"
    shutil.copytree(model["config"], broken)
    (broken / "unet" / "config.json").write_text("{")
    listed = tmp_path / "listed"
    shutil.copytree(model["config"], listed)
    (listed / "unet" / "config.json").write_text("[]")
    wide = tmp_path / "wide"
    shutil.copytree(model["config"], wide)
    config = json.loads((wide / "unet" / "config.json").read_text())
    (wide / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    file, cut = model["base"], str(tmp_path / "cut.safetensors")
    for given, told in (
        (str(tmp_path / "model.ckpt"), r"model\.ckpt is a pickle, which is not loaded: convert it"),
        ("someone/merges/model.ckpt", r"model\.ckpt is a pickle"),
        (str(tmp_path / "model.gguf"), r"model\.gguf is a file; expected a folder, a hub id or a \.safe"),
        (cut, r"was cut short: it has 100,000 of [\d,]+ bytes; download it again"),
        ("none.safetensors", r"none\.safetensors not found: check the path; a file on the hub is OWNER/NAME"),
        ("models/none.safetensors", r"models/none\.safetensors not found: check the path"),
        (str(tmp_path / "none.safetensors"), r"none\.safetensors not found: check the path"),
        (Parts(base=file, config=str(folder)), r"lacks vae/config\.json, tokenizer/tokenizer\.json"),
        (Parts(base=file, config=str(broken)), r"unet/config\.json cannot be read"),
        (
            Parts(base=file, config=str(listed)),
            r"config\.json is a JSON list, expected a mapping|describes a U-Net",
        ),
        (Parts(base=file, config=models(True)["config"]), "is that of a StableDiffusionXLPipeline, but"),
        (Parts(base=file, config=str(wide)), "reads text of width 768; that of .* has 32 and 32"),
        (Parts(base=file, config="/no/such"), "/no/such not found"),
        (
            Parts(base=model["config"], config=model["config"]),
            r"is for a base that is one \.safetensors file",
        ),
        (Parts(base="sd15", config=model["config"]), r"is for a base that is one \.safetensors file"),
    ):
        with pytest.raises(ModelError, match=told):
            find_model(given)


def test_weights_that_the_configuration_has_and_the_file_lacks_are_named(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = models(False)["config"]
    weights = original_weights(config)
    norm = CLIP.replace("embeddings.position_embedding", "final_layer_norm")
    for key, told in (
        (f"{UNET}middle_block.0.in_layers.0.weight", "1 of the 208 weights of its unet"),
        (norm, "1 of the 68 weights of its text_encoder"),
        ("first_stage_model.decoder.norm_out.bias", "1 of the 124 weights of its vae"),
    ):
        file = tmp_path / "lacks.safetensors"
        save_file({name: value for name, value in weights.items() if name != key}, file)
        model = {"base": str(file), "config": config}
        with pytest.raises(ModelError, match=r"lacks\.safetensors .*lacks (weights|1 of)"):
            ContextDiffusion.from_pretrained(model, device="cpu")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(config)  # whole, as without accelerate
        with pytest.raises(ModelError, match=rf"lacks\.safetensors does not fit .*: it lacks {told}"):
            check_weights(pipe, Parts(**model), set())
    more = tmp_path / "more.safetensors"
    save_file(weights | {f"{UNET}time_embed.cond_proj.weight": torch.zeros(2, 2)}, more)
    ContextDiffusion.from_pretrained({"base": str(more), "config": config}, device="cpu")
    assert "1 weights of its U-Net have no place in it" in capsys.readouterr().err
    wrong = tmp_path / "wrong.safetensors"
    save_file(weights | {f"{UNET}out.2.bias": torch.zeros(7)}, wrong)
    with pytest.raises(ModelError, match=r"wrong\.safetensors cannot be loaded with the configuration"):
        ContextDiffusion.from_pretrained({"base": str(wrong), "config": config}, device="cpu")


def test_contexts_are_prepared_as_the_configuration_says(models: Any, tmp_path: Path) -> None:
    """As diffusers does for a base's folder: by its feature_extractor, if that fits the image encoder."""
    config = tmp_path / "config"
    shutil.copytree(models(False)["config"], config)
    index = json.loads((config / "model_index.json").read_text())
    (config / "model_index.json").write_text(
        json.dumps(index | {"feature_extractor": ["transformers", "CLIPImageProcessor"]})
    )
    (config / "feature_extractor").mkdir()
    own = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    own |= {"image_mean": [0.5, 0.4, 0.3], "image_processor_type": "CLIPImageProcessor"}
    (config / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(own))
    parts = {"image_encoder": make_image_encoder(tmp_path)}
    parts |= make_ip_adapter(tmp_path, models(False)["config"])
    model = {"base": models(False)["base"], "config": str(config), **parts}
    contexts: Any = find_model(Parts(**model)).contexts
    assert tuple(contexts.mean) == (0.5, 0.4, 0.3)
    image = ContextDiffusion.from_pretrained(model, device="cpu", cpu_threads=1)(
        picture(1, SIDE, SIDE), [picture(2, 40, 50)], "a", num_inference_steps=1
    )
    assert len(np.unique(np.asarray(image))) > 30
