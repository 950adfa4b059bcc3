"""How a single-file checkpoint is built: its configuration, found, fetched and compared with the file. Knows
no torch and reads no weights."""

from __future__ import annotations

import json
from pathlib import Path

from context_diffusion.core.errors import ModelError
from context_diffusion.core.model_parts import PRESETS, Parts
from context_diffusion.models.resolution.hub import commit_of, fetch, parsed_json
from context_diffusion.models.resolution.single_file import (
    SUFFIX,
    VAES,
    Checkpoint,
    is_single_file,
    read_checkpoint,
)

# Keys by which community checkpoints say how they were trained: options of scheduler_config.json.
TRAINED_WITH = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}

# The files that say how a checkpoint is built, and those that must be among them.
SMALL_FILES = ("*.json", "*.txt")
CONFIGURATION = (
    "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json")


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


def _check(checkpoint: Checkpoint, parts: Parts) -> None:
    """Check that a configuration is whole and suits the checkpoint. Raises ModelError."""
    config = str(parts.config)
    folder = fetch_configuration(config, parts.revision)
    subject = f"model: config {config}"
    if missing := _missing_files(folder, checkpoint.xl):
        raise ModelError(
            f"{subject} lacks {', '.join(missing)}: expected the configuration of a {checkpoint.family} in "
            "diffusers' format; if it is a hub id, the cache may hold only a part: run once with a network"
        )
    index, unet, scheduler = (
        parsed_json(folder / name, f"{config}/{name}")
        for name in (CONFIGURATION[0], CONFIGURATION[1], CONFIGURATION[4])
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


def _missing_files(folder: Path, xl: bool) -> list[str]:
    """Return the files that a configuration lacks. xl: of an XL model."""
    names = (*CONFIGURATION, *(["text_encoder_2/config.json"] if xl else []))
    missing = [name for name in names if not (folder / name).is_file()]
    for tokenizer in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        if not any((folder / tokenizer / vocabulary).is_file() for vocabulary in VOCABULARIES):
            missing.append(f"{tokenizer}/{VOCABULARIES[0]}")
    return missing
