"""Names, folders and hub ids of models: found where they are, refused with what to do; a hub's cache stands
in for the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import PRESETS, Parts, parts_of
from context_diffusion.models.native.model import NativeModel
from context_diffusion.models.resolution.hub import commit_of, fetch, split
from context_diffusion.models.resolution.resolve import COMPONENTS, find_model
from context_diffusion.pipeline import ContextDiffusion
from support.tiny import tiny_model
from support.tiny_diffusers import make_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub is out of reach; its cache holds someone/base and someone/parts."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = make_base(tmp_path)
    for repo in ("base", "parts"):
        folder = root / f"models--someone--{repo}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots").mkdir()
    shutil.copytree(base, root / "models--someone--base" / "snapshots" / COMMIT)
    encoder = root / "models--someone--parts" / "snapshots" / COMMIT / "deep" / "encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps({"image_size": 48}))
    return root


def test_a_part_may_lie_in_a_folder_of_a_hub_id() -> None:
    assert split("h94/IP-Adapter/sdxl_models/image_encoder") == (
        "h94/IP-Adapter",
        "sdxl_models/image_encoder",
    )
    assert split("someone/base") == ("someone/base", "")


def test_a_hub_id_in_the_cache_is_found_without_a_network_at_its_commit(cache: Path) -> None:
    found = find_model(Parts(base="someone/base", image_encoder="someone/parts/deep/encoder"))
    assert found.parts is not None
    assert found.parts.revision == {"someone/base": COMMIT, "someone/parts": COMMIT}
    assert (found.image_size, found.contexts.size) == (64, 48)
    assert find_model("someone/base").name == "someone/base"


def test_what_the_plan_found_is_kept_when_the_hub_moves_on(cache: Path) -> None:
    other = COMMIT[::-1]
    snapshots = cache / "models--someone--base"
    shutil.copytree(snapshots / "snapshots" / COMMIT, snapshots / "snapshots" / other)
    (snapshots / "refs" / "main").write_text(other)
    assert find_model("someone/base", {"someone/base": COMMIT}).parts.revision == {"someone/base": COMMIT}  # type: ignore[union-attr]
    assert find_model("someone/base").parts.revision == {"someone/base": other}  # type: ignore[union-attr]


def test_a_native_model_on_the_hub_is_loaded_at_the_commit_that_the_plan_found(cache: Path) -> None:
    root, other = cache / "models--someone--native", COMMIT[::-1]
    tiny_model().save_pretrained(root / "snapshots" / COMMIT)
    shutil.copytree(root / "snapshots" / COMMIT, root / "snapshots" / other)
    index = root / "snapshots" / other / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"noise_scale": 0.125}))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    planned = find_model("someone/native")
    (root / "refs" / "main").write_text(other)
    assert planned.folder
    assert planned.parts
    assert find_model("someone/native").revision != planned.revision
    assert find_model(planned.parts).revision == planned.revision
    pipeline = ContextDiffusion.from_pretrained(planned.parts)
    assert pipeline.backbone.noise_scale != 0.125
    assert ContextDiffusion.from_pretrained("someone/native").backbone.noise_scale == 0.125


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("someone/other", "not in the cache, and the hub.* cannot be reached: HF_HUB_OFFLINE is set"),
        (
            "./nowhere",
            "not found: expected a folder, a hub id or one of bundled, flux2-klein, .*, sd15, sdxl",
        ),
        (
            "sd51",
            "not found: expected a folder, a hub id or one of bundled, flux2-klein, .*, sd15, sdxl",
        ),
        (Parts(base="someone/base", vae="/no/such/vae"), "/no/such/vae not found"),
        ("someone/parts", "model_index.json"),
        ("a/b/c d", "not found: expected a folder or a hub id|not in the cache"),
    ],
)
def test_a_wrong_name_says_what_to_do(cache: Path, model: str | Parts, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        find_model(model)


@pytest.mark.parametrize("part", COMPONENTS)
def test_a_native_folder_that_lacks_a_component_is_refused_before_any_engine_starts(
    part: str, tmp_path: Path
) -> None:
    assert set(COMPONENTS) == {*NativeModel.MODULES, "tokenizer"}
    tiny_model().save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(ModelError, match=f"has no component {part}/; copy the whole"):
        find_model(str(tmp_path / "model"))


def test_a_commit_is_taken_as_it_is() -> None:
    assert commit_of("any/thing", COMMIT) == COMMIT


def test_every_part_of_a_preset_has_a_commit_and_is_replaceable() -> None:
    for name, preset in PRESETS.items():
        parts = {split(part)[0] for part in preset.all}
        # Of this one no commit could be confirmed: the newest is taken when the job is planned.
        assert parts - set(preset.revision) == ({preset.base} if name == "flux2-klein-base" else set())
        assert all(len(commit) == 40 for commit in preset.revision.values())
    own = parts_of(Parts(base="sd15", controlnet="mine/net", revision={"mine/net": COMMIT}))
    assert own.controlnet == "mine/net"
    assert own.ip_adapter == PRESETS["sd15"].ip_adapter
    assert own.safety_checker == "stable-diffusion-v1-5/stable-diffusion-v1-5/safety_checker"
    assert parts_of(Parts(base="sd15", safety_checker=None)).safety_checker is None
    assert own.revision["mine/net"] == COMMIT
    assert own.revision["h94/IP-Adapter"] == PRESETS["sd15"].revision["h94/IP-Adapter"]


def test_a_folder_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fetch(str(tmp_path), "config.json", {}) == tmp_path / "config.json"


def test_the_bundled_model_as_a_mapping() -> None:
    assert find_model(Parts(base="bundled")) == find_model("bundled")
    with pytest.raises(ModelError, match="few_steps does not apply to a native model, which bundled is"):
        find_model(Parts(base="bundled", few_steps="lightning"))
