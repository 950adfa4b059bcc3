"""Single-file checkpoints of Stable Diffusion, as communities publish them: what a file holds, read from its
safetensors header, and the configuration that says how it is built. Knows no torch and reads no weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import PRESETS, Parts
from context_diffusion.models.resolution.hub import (
    Shapes,
    cached_file,
    commit_of,
    fetch,
    parsed_json,
    remote_shapes,
)

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNET = "model.diffusion_model."
FIRST_LAYER = f"{UNET}input_blocks.0.0.weight"
VAES = ("first_stage_model.", "vae.")
# The text encoders' keys that diffusers' loader looks for.
CLIP = "cond_stage_model.transformer.text_model."
POSITIONS = "embeddings.position_embedding.weight"
OPEN_CLIP = "cond_stage_model.model.token_embedding.weight"
XL_CLIP = "conditioner.embedders.0.transformer.text_model."
XL_OPEN_CLIP = "conditioner.embedders.1.model.positional_embedding"
REFINER = "conditioner.embedders.0.model."
# Keys by which community checkpoints say how they were trained: options of scheduler_config.json.
TRAINED_WITH = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}

# The files that say how a checkpoint is built, and those that must be among them.
SMALL_FILES = ("*.json", "*.txt")
CONFIGURATION = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json")

MAX_HEADER = 100_000_000  # bytes, the format's own limit; a larger number is the start of something else
SIGNATURES = {
    b"PK": "a pickle under another name; pickles are not loaded, convert it to safetensors",
    b"\x80": "a pickle under another name; pickles are not loaded, convert it to safetensors",
    b"version ": "a Git LFS pointer in place of the weights; run `git lfs pull`",
    b"<": "a web page; download the file again, where needed with an account",
    b"GGUF": "a GGUF file, which is not supported",
}
# What else a .safetensors file may hold: a pattern of its keys, and what to do.
FOREIGN = (
    (
        r"^(control_model|controlnet_\w+|input_hint_block|lora_controlnet)\b",
        "a ControlNet; use model: {base: ..., controlnet: FOLDER} with its folder in diffusers' format",
    ),
    (
        r"^lora_|\.lora_|\.lora\.|\.hada_w|\.lokr_w",
        "a LoRA: use model: {base: ..., lora: FILE}",
    ),
    (
        r"^(ip_adapter|image_proj)\.",
        "an IP-Adapter; use model: {base: ..., ip_adapter: FOLDER, ip_adapter_weight_name: FILE}",
    ),
    (
        r"^(model\.diffusion_model\.)?(single_stream_modulation|double_stream_modulation_\w+)\.",
        "a FLUX.2 checkpoint; FLUX.2 [klein] is loaded from a folder or hub id in diffusers' format",
    ),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "a FLUX checkpoint, which has no backbone here"),
    (
        r"^(model\.diffusion_model\.)?joint_blocks\.",
        "a Stable Diffusion 3 checkpoint, which has no backbone here",
    ),
    (r"^edm_mean$", "a Playground v2.5 checkpoint, whose noise schedule is not supported"),
    (
        r"^input_blocks\.",
        "a diffusion model only, as in ComfyUI's unet folder: it has no text encoder and no VAE; "
        "use the whole checkpoint",
    ),
    (
        r"^(encoder|decoder)\.(conv_in|mid|down|up|down_blocks|up_blocks)\.",
        "a VAE alone; use model: {base: ..., vae: FOLDER} with its folder in diffusers' format",
    ),
    (r"^(clip_[lg]|emb_params)$", "a textual inversion embedding, which is not supported"),
    (
        r"^(down_blocks|mid_block|text_model|vision_model|transformer_blocks|single_transformer_blocks)\.",
        "one component in diffusers' or transformers' format; name the folder that holds model_index.json",
    ),
)  # fmt: skip
CHANNELS = {9: "an inpainting model", 8: "an instruct-pix2pix model", 5: "a depth model", 7: "an upscaler"}


@dataclass(frozen=True)
class Checkpoint:
    """What a single file holds. family: for messages; preset: whose configuration suits it, None: it must be
    given; shapes: those of its tensors, by key."""

    family: str
    xl: bool
    preset: str | None
    shapes: Shapes

    def count(self, *prefixes: str) -> int:
        """Count the weights whose keys begin with one of the prefixes."""
        return sum(key.startswith(prefixes) and not key.endswith(".position_ids") for key in self.shapes)

    @property
    def text_width(self) -> int | None:
        """The width of the text that the U-Net's cross-attentions read."""
        keys = (key for key in self.shapes if key.startswith(UNET) and key.endswith("attn2.to_k.weight"))
        return next((self.shapes[key][-1] for key in keys), None)

    @property
    def channels(self) -> int:
        """The channels of the U-Net's first level."""
        return self.shapes[FIRST_LAYER][0]


def is_single_file(base: str) -> bool:
    """Return whether a base is a file of all weights, here or in a hub repository."""
    return base.endswith(SUFFIX) and not Path(base).is_dir()


def check_path(base: str) -> None:
    """Raise ModelError for a file that is no safetensors file, and for a missing one that is not on the
    hub."""
    path = Path(base)
    if base.endswith(PICKLES) and not path.is_dir():
        raise ModelError(f"model: {base} is a pickle, which is not loaded: convert it to {SUFFIX}")
    if path.is_file() and not base.endswith(SUFFIX):
        raise ModelError(f"model: {base} is a file; expected a folder, a hub id or a {SUFFIX} checkpoint")
    hub_file = base.count("/") > 1 and not base.startswith((".", "/", "~"))
    if is_single_file(base) and not path.is_file() and not hub_file:
        raise ModelError(
            f"model: {base} not found: check the path; a file on the hub is OWNER/NAME/FILE{SUFFIX}"
        )


def with_configuration(parts: Parts, commits: dict[str, str]) -> Parts:
    """Return the parts with the configuration that their single file is built by; other bases unchanged.

    commits: known commits by hub id. Fetches the configuration's files and checks that they suit the file.
    Raises ModelError."""
    if not is_single_file(parts.base):
        if parts.config is not None:
            raise ModelError(
                f"model: config {parts.config} is for a base that is one {SUFFIX} file; {parts.base} has its "
                "own configuration: leave it out"
            )
        return parts
    checkpoint = read_checkpoint(parts.base, parts.revision)
    if not checkpoint.count(*VAES) and parts.vae is None:
        raise ModelError(f"model: {parts.base} has no VAE: name one, model: {{base: ..., vae: FOLDER}}")
    if parts.config is None:
        parts = _with_default(parts, checkpoint, commits)
    _check(checkpoint, parts)
    return parts


def _with_default(parts: Parts, checkpoint: Checkpoint, commits: dict[str, str]) -> Parts:
    if checkpoint.preset is None:
        raise ModelError(
            f"model: {parts.base} is a {checkpoint.family} checkpoint, whose versions differ in size and "
            "prediction type: set model: {base: ..., config: FOLDER} to a folder or hub id of its version in "
            "diffusers' format"
        )
    preset = PRESETS[checkpoint.preset]
    commit = commit_of(preset.base, commits.get(preset.base) or preset.revision[preset.base])
    revision = parts.revision | {preset.base: commit}
    try:
        fetch_configuration(preset.base, revision)
    except ModelError as error:
        raise ModelError(
            f"model: the configuration of {parts.base}, a {checkpoint.family} checkpoint, is that of "
            f"{preset.base}, which is not in the cache: set model: {{base: ..., config: FOLDER}} to a folder "
            f"in diffusers' format, or run `context-diffusion warm` once with a network ({error})"
        ) from error
    return parts.model_copy(update={"config": preset.base, "revision": revision})


def fetch_configuration(config: str, revision: dict[str, str]) -> Path:
    """Return the folder of a configuration's files, without weights; download them if needed. Raises
    ModelError."""
    return fetch(config, "", revision, SMALL_FILES)


def read_checkpoint(base: str, revision: dict[str, str]) -> Checkpoint:
    """Read what a single file holds from its header; of a file on the hub only the header is fetched.

    Raises ModelError saying what it is, if not a Stable Diffusion."""
    path = Path(base) if Path(base).is_file() else cached_file(base, revision)
    shapes = _shapes(path, base) if path else remote_shapes(base, revision)
    keys = "\n".join(shapes)
    for pattern, what in FOREIGN:
        if re.search(pattern, keys, re.MULTILINE):
            raise ModelError(f"model: {base} is {what}")
    first = shapes.get(FIRST_LAYER, ())
    if len(first) < 2:
        known = ", ".join(sorted(shapes)[:3]) or "none"
        raise ModelError(
            f"model: {base} is not a Stable Diffusion checkpoint: it has no U-Net; its first keys are {known}"
        )
    if (channels := first[1]) != 4:
        what = CHANNELS.get(channels, "another model")
        raise ModelError(
            f"model: {base} is {what}, whose U-Net reads {channels} channels: use a text-to-image checkpoint"
        )
    if XL_OPEN_CLIP in shapes and XL_CLIP + POSITIONS in shapes:
        return Checkpoint("Stable Diffusion XL", True, "sdxl", shapes)
    if any(key.startswith(REFINER) for key in shapes):
        raise ModelError(f"model: {base} is an SDXL refiner, which cannot generate alone: use the SDXL base")
    if CLIP + POSITIONS in shapes:
        return Checkpoint("Stable Diffusion 1.x", False, "sd15", shapes)
    if OPEN_CLIP in shapes:
        return Checkpoint("Stable Diffusion 2.x", False, None, shapes)
    if re.search(r"^(cond_stage_model|conditioner|text_encoders)\.", keys, re.MULTILINE):
        raise ModelError(
            f"model: {base} has a text encoder in keys that diffusers' loader does not read: convert the file"
        )
    raise ModelError(
        f"model: {base} is a diffusion model only, as in ComfyUI's unet folder: it has no text encoder; use "
        "the whole checkpoint"
    )


def _shapes(path: Path, base: str) -> Shapes:
    """Read the shapes of a local file's tensors. Raises ModelError for a file that is damaged or of another
    kind."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise ModelError(f"model: {base} cannot be read: {error}") from error
    known = [what for magic, what in SIGNATURES.items() if length > MAX_HEADER and start.startswith(magic)]
    if known:
        raise ModelError(f"model: {base} is {known[0]}")
    try:
        tensors = {key: entry for key, entry in json.loads(text).items() if key != "__metadata__"}
        shapes = {key: tuple(entry["shape"]) for key, entry in tensors.items()}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"model: {base} is damaged or not a safetensors file: its header cannot be read; download it "
            "again"
        ) from error
    if size < whole:
        raise ModelError(
            f"model: {base} was cut short: it has {size:,} of {whole:,} bytes; download it again"
        )
    return shapes


def _check(checkpoint: Checkpoint, parts: Parts) -> None:
    """Check that a configuration is whole and suits the checkpoint. Raises ModelError."""
    config = str(parts.config)
    folder = fetch_configuration(config, parts.revision)
    more = ("text_encoder_2/config.json",) if checkpoint.xl else ()
    missing = [name for name in (*CONFIGURATION, *more) if not (folder / name).is_file()]
    for name in ("tokenizer", "tokenizer_2") if checkpoint.xl else ("tokenizer",):
        if not any((folder / name / vocabulary).is_file() for vocabulary in VOCABULARIES):
            missing.append(f"{name}/{VOCABULARIES[0]}")
    subject = f"model: config {config}"
    if missing:
        raise ModelError(
            f"{subject} lacks {', '.join(missing)}: expected the configuration of a {checkpoint.family} in "
            "diffusers' format; if it is a hub id, the cache may hold only a part: run once with a network"
        )
    index, unet, scheduler = (
        parsed_json(folder / name, config) for name in (CONFIGURATION[0], CONFIGURATION[1], CONFIGURATION[4])
    )
    kind = str(index.get("_class_name"))
    known = kind.startswith(("StableDiffusion", "LatentConsistencyModel"))
    if not known or ("StableDiffusionXL" in kind) != checkpoint.xl:
        raise ModelError(
            f"{subject} is that of a {kind}, but {parts.base} is a {checkpoint.family} checkpoint: name the "
            "configuration of one"
        )
    width = unet.get("cross_attention_dim")
    channels = unet.get("block_out_channels", [320])[0]
    if (channels, width) != (checkpoint.channels, checkpoint.text_width) and isinstance(width, int):
        raise ModelError(
            f"{subject} describes a U-Net of {channels} channels that reads text of width {width}; that of "
            f"{parts.base} has {checkpoint.channels} and {checkpoint.text_width}: name the configuration of "
            "the model that it was made from"
        )
    marks = {mark: option for mark, option in TRAINED_WITH.items() if mark in checkpoint.shapes}
    if any(scheduler.get(name) != value for name, value in marks.values()):
        options = ", ".join(f"{name}: {json.dumps(value)}" for name, value in marks.values())
        raise ModelError(
            f"{subject} has another noise schedule than {parts.base}, whose keys {', '.join(marks)} say "
            f"{options}: set `config:` to a folder whose scheduler/scheduler_config.json says so"
        )
