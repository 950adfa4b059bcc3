"""Single-file checkpoints of Stable Diffusion, as communities publish them: what a file holds, read from its
safetensors header. Knows no torch and reads no weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from context_diffusion.core.errors import ModelError
from context_diffusion.models.resolution.hub import Shapes, cached_file, remote_shapes

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
MAX_HEADER = 100_000_000  # bytes, the format's own limit; a larger number is the start of something else
SIGNATURES = {
    b"PK": "a pickle under another name; pickles are not loaded, convert it to safetensors",
    b"\x80": "a pickle under another name; pickles are not loaded, convert it to safetensors",
    b"version ": "a Git LFS pointer in place of the weights; run `git lfs pull`",
    b"<": "a web page; download the file again, if needed with an account",
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
