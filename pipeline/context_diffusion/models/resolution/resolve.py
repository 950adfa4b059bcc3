"""Resolve a job's `model:` to folders and commits. Knows no torch: the driver resolves it before any engine
starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import (
    FLUX2_PARTS,
    LICENCES,
    PRESETS,
    STABLE_DIFFUSION_PARTS,
    ModelKind,
    Parts,
    parts_of,
    refuse_parts,
)
from context_diffusion.core.records import DEPTH_MODEL
from context_diffusion.inputs.context_images import (
    TEXTURE_PIXELS,
    ContextPreprocessing,
    ImageProcessor,
    ReferenceImage,
    SquareCrop,
    image_processor,
)
from context_diffusion.models.resolution.base_networks import check_networks
from context_diffusion.models.resolution.controlnets import CONTROLNETS, control_types
from context_diffusion.models.resolution.defaults import (
    Defaults,
    flux2_defaults,
    native_defaults,
    stable_diffusion_defaults,
)
from context_diffusion.models.resolution.few_steps import few_steps_of
from context_diffusion.models.resolution.hub import (
    commit_of,
    fetch,
    fetch_optional,
    parsed_json,
    read_json,
    split,
)
from context_diffusion.models.resolution.single_file import check_path, is_single_file
from context_diffusion.models.resolution.single_file_configuration import with_configuration

BUNDLED = Path(__file__).parents[1] / "native" / "bundled"
NATIVE = "ContextDiffusion"  # _class_name in a native model's index
NOT_NATIVE_PARTS = (*FLUX2_PARTS, *STABLE_DIFFUSION_PARTS, "lora")
FLUX2 = "Flux2KleinPipeline"
FLUX2_LATENTS = 128  # a side, the default size of that pipeline
PREPROCESSOR = "preprocessor_config.json"
# Folders of a native model; models/native/model.py loads them.
COMPONENTS = (
    "vae",
    "unet",
    "controlnet",
    "image_encoder",
    "text_encoder",
    "fusion",
    "memory",
    "relief",
    "tokenizer",
)


@dataclass(frozen=True)
class ResolvedModel:
    """A model and its exact version.

    kind: which backbone runs it. folder: of a native model. parts: of any other model, and of a native one on
    the hub; every hub id at a commit. revision: a digest over the weights' version. image_size: pixels.
    contexts: how context images are prepared. defaults: the settings that a job which leaves them out
    gets."""

    name: str
    kind: ModelKind
    folder: Path | None
    parts: Parts | None
    revision: str
    image_size: int
    contexts: ContextPreprocessing
    defaults: Defaults = field(default_factory=Defaults)

    @property
    def licence(self) -> str | None:
        """The licence of the base's weights; None: it is not known here."""
        return LICENCES.get(split(self.parts.base)[0]) if self.parts else None


def model_folder(model: str) -> Path:
    """Return the folder of a native model: `bundled` or a folder. Raises ModelError naming what is
    missing."""
    folder = BUNDLED if model == "bundled" else Path(model)
    if not folder.is_dir():
        raise ModelError(f"model: {model!r} not found: expected `bundled` or a folder")
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"model: {folder} has no model_index.json; expected the folder model/ that `kind: train` writes"
        )
    return folder


def check_name(model: str) -> None:
    """Raise ModelError for what is no known name, no folder that exists, no file's name and no hub id."""
    if model in (*PRESETS, "bundled") or Path(model).is_dir() or is_single_file(model):
        return
    if model.startswith((".", "/", "~")) or "/" not in model.rstrip("/"):
        names = ", ".join(["bundled", *PRESETS])
        raise ModelError(f"model: {model!r} not found: expected a folder, a hub id or one of {names}")


def find_model(model: str | Parts, commits: dict[str, str] | None = None) -> ResolvedModel:
    """Resolve a name, a folder or a hub id; only small files are downloaded.

    commits: known commits by hub id. Raises ModelError naming the part."""
    if isinstance(model, Parts) and model.base == "bundled":
        refuse_parts(model, NOT_NATIVE_PARTS, "a native model")
        model = model.base
    check_path(model if isinstance(model, str) else model.base)
    if isinstance(model, str) and model not in PRESETS:
        check_name(model)
        if model == "bundled" or Path(model).is_dir():
            index = read_json(str(model_folder(model)), "model_index.json", {})
            if index.get("_class_name") == NATIVE:
                return _native(model, model_folder(model), index)
    given = Parts(base=model) if isinstance(model, str) else model
    parts = parts_of(given)
    known = (commits or {}) | parts.revision
    parts = with_configuration(_at_commits(parts, known), known)
    name = model if isinstance(model, str) else parts.base
    index = read_json(parts.configuration, "model_index.json", parts.revision)
    if index.get("_class_name") == NATIVE:
        refuse_parts(given, NOT_NATIVE_PARTS, "a native model")
        return _native(name, fetch(parts.base, "", parts.revision), index, parts if parts.revision else None)
    kind = str(index.get("_class_name"))
    if kind == FLUX2:
        return _flux2(name, parts, given, index)
    if not kind.startswith(("StableDiffusion", "LatentConsistencyModel")):
        raise ModelError(
            f"model: {parts.base} is a {kind}, which has no backbone here; known are ContextDiffusion, "
            f"{FLUX2} and diffusers' pipelines of Stable Diffusion and latent consistency models"
        )
    refuse_parts(given, FLUX2_PARTS, "Stable Diffusion")
    return _stable_diffusion(name, parts, index, known)


def _at_commits(parts: Parts, known: dict[str, str]) -> Parts:
    """Return the parts with a commit for each hub id. known: commits or branches by hub id. Raises ModelError
    for a path that does not exist."""
    away = [part for part in parts.all if not Path(part).exists()]
    for part in away:
        if part.startswith((".", "/", "~")):
            raise ModelError(f"model: {part} not found: check the path")
    hub = sorted({split(part)[0] for part in away})
    return parts.model_copy(update={"revision": {repo: commit_of(repo, known.get(repo)) for repo in hub}})


def _native(name: str, folder: Path, index: dict[str, Any], parts: Parts | None = None) -> ResolvedModel:
    for part in COMPONENTS:
        if not (folder / part).is_dir():
            raise ModelError(f"model: {folder} has no component {part}/; copy the whole model folder")
    contexts = SquareCrop(max(index["context_size"], TEXTURE_PIXELS))
    defaults = native_defaults(index["context_slots"])
    return ResolvedModel(
        name, "native", folder, parts, digest(folder), index["image_size"], contexts, defaults
    )


def _stable_diffusion(name: str, parts: Parts, index: dict[str, Any], known: dict[str, str]) -> ResolvedModel:
    """Resolve a Stable Diffusion and its parts. index: the model_index.json of its configuration. known:
    commits by hub id."""
    unet, own_vae, scheduler = (
        read_json(parts.configuration, file, parts.revision)
        for file in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    vae = read_json(parts.vae, "config.json", parts.revision) if parts.vae else own_vae
    xl = "StableDiffusionXL" in str(index.get("_class_name"))
    check_networks(parts, index, unet, vae, xl)
    image_size = latent_side(unet.get("sample_size"), xl) * latent_factor(vae)
    few_steps = few_steps_of(parts, xl, unet)
    if few_steps:
        published = {split(few_steps.lora)[0]: few_steps.commit}
        parts = _at_commits(_with_lora(parts, few_steps.lora), published | known | parts.revision)
    _check_depth_estimator(parts)
    types = [
        None if net in CONTROLNETS else control_types(read_json(net, "config.json", parts.revision))
        for net in parts.controlnets
    ]
    defaults = replace(
        stable_diffusion_defaults(parts, unet, xl, scheduler, few_steps),
        control_types=tuple(types),
        estimates_depth=parts.depth_estimator is not None,
    )
    kind: ModelKind = "sdxl" if xl else "sd"
    return ResolvedModel(
        name, kind, None, parts, _revision(parts), image_size, _preprocessing(parts, index), defaults
    )


def latent_side(sample_size: int | None, xl: bool) -> int:
    """Return the side of the latents that a U-Net was trained for; where its configuration has none, that of
    diffusers' pipelines."""
    return sample_size or (128 if xl else 64)


def latent_factor(vae: Mapping[str, Any]) -> int:
    """Return the pixels a side of a latent. vae: its configuration."""
    return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)


def _with_lora(parts: Parts, file: str) -> Parts:
    """Return the parts with the file among the fused LoRAs, at scale 1; unchanged if it is one: resolved
    parts are resolved again by each engine."""
    files = [name for name, _ in parts.fused_loras]
    if file in files:
        return parts
    scales = [scale for _, scale in parts.fused_loras]
    return parts.model_copy(update={"lora": [*files, file], "lora_scale": [*scales, 1.0]})


def _check_depth_estimator(parts: Parts) -> None:
    """Raise ModelError if the depth estimator is another kind of model."""
    if parts.depth_estimator is None:
        return
    config = read_json(parts.depth_estimator, "config.json", parts.revision)
    classes = config.get("architectures") or [config.get("_class_name", "model of an unknown class")]
    if not any(str(name).endswith("ForDepthEstimation") for name in classes):
        raise ModelError(
            f"model: depth_estimator {parts.depth_estimator} is a {classes[0]}, expected a transformers "
            f"model for depth estimation such as {DEPTH_MODEL}"
        )


def _flux2(name: str, parts: Parts, given: Parts, index: dict[str, Any]) -> ResolvedModel:
    """Resolve a FLUX.2 [klein]. given: what the user said of its parts; index: its model_index.json."""
    refuse_parts(given, STABLE_DIFFUSION_PARTS, "FLUX.2 [klein]")
    vae = read_json(parts.base, "vae/config.json", parts.revision)
    factor = latent_factor(vae)
    defaults = flux2_defaults(bool(index.get("is_distilled")))
    contexts = ReferenceImage(parts.max_reference_pixels, multiple=2 * factor)
    return ResolvedModel(
        name, "flux2", None, parts, _revision(parts), FLUX2_LATENTS * factor, contexts, defaults
    )


def _preprocessing(parts: Parts, index: dict[str, Any]) -> ImageProcessor:
    """Return the preprocessing of context images, as diffusers chooses it: by the image encoder's own
    preprocessor_config.json, else by the base's if it fits the encoder, else CLIP's at the encoder's size."""
    if parts.image_encoder is None:
        return image_processor(None, 224, parts.base)
    side = read_json(parts.image_encoder, "config.json", parts.revision)["image_size"]
    if path := fetch_optional(parts.image_encoder, PREPROCESSOR, parts.revision):
        config = parsed_json(path, f"{parts.image_encoder}/{PREPROCESSOR}")
        return image_processor(config, side, parts.image_encoder)
    if any(index.get("feature_extractor") or []):
        name = f"feature_extractor/{PREPROCESSOR}"
        path = fetch_optional(parts.configuration, name, parts.revision)
        with suppress(ModelError):  # made for another encoder: the base's safety checker, at another size
            if path:
                config = parsed_json(path, f"{parts.configuration}/{name}")
                return image_processor(config, side, parts.base)
    return image_processor(None, side, parts.image_encoder)


def _revision(parts: Parts) -> str:
    """Return a digest over the parts: hub ids by commit, folders and files by their bytes."""
    fields = parts.model_dump(mode="json", exclude_defaults=True)
    # Of a configuration no weights are read.
    fields["local"] = {
        part: digest(Path(part), weights=part != parts.config) for part in parts.all if Path(part).exists()
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def digest(path: Path, weights: bool = True) -> str:
    """Return a digest over the names and bytes of a folder's files, or over a file's bytes. weights: include
    those of a folder."""
    suffixes = (".json", ".safetensors", ".txt") if weights else (".json", ".txt")
    total = hashlib.sha256()
    files = [path] if path.is_file() else (p for p in path.rglob("*") if p.suffix in suffixes)
    for file in sorted(files):
        with file.open("rb") as opened:
            total.update(
                f"{file.relative_to(path)}\0".encode() + hashlib.file_digest(opened, "sha256").digest()
            )
    return total.hexdigest()[:16]
