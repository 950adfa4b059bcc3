"""The `model:` mapping of a pretrained model's parts, and the named models with their commits."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from context_diffusion.core.errors import ConfigError, ModelError
from context_diffusion.core.job_base import NormalizationKind, StrictModel

# The lanes that a chunk, one call of the model, may have, by model and kind of device: the first is that of
# jobs; smaller ones are for single images and where memory is short, larger ones for rows with more lanes.
# They decide the bits of images, so they are a table.
ModelKind = Literal["native", "sd", "sdxl", "flux2"]
CHUNKS: dict[tuple[ModelKind, str], tuple[int, ...]] = {
    ("native", "cpu"): (2, 1, 3, 4),
    ("native", "cuda"): (32, 16, 8, 4, 3, 2, 1),
    ("sd", "cpu"): (2, 1, 3, 4),
    ("sd", "cuda"): (16, 8, 4, 3, 2, 1),
    ("sdxl", "cpu"): (2, 1, 3, 4),
    ("sdxl", "cuda"): (8, 6, 4, 3, 2, 1),
    ("flux2", "cpu"): (2, 1),
    ("flux2", "cuda"): (1, 2, 4),  # a lane has thousands of tokens, which fill a GPU
}
FewStepsName = Literal["lcm", "lightning", "hyper"]
# Parts of one kind of model alone: for the others they are refused.
FLUX2_PARTS = ("max_reference_pixels", "prompt_template")
STABLE_DIFFUSION_PARTS = (
    "controlnet", "ip_adapter", "ip_adapter_weight_name", "image_encoder", "vae", "safety_checker",
    "clip_skip", "prompt_chunks", "normalization", "loras", "few_steps",
    "depth_estimator",
)  # fmt: skip


# Black Forest Labs' prompting guides refer to references as "image 1", "image 2".
PROMPT_TEMPLATE = (
    "Keep the exact composition of image 1. Render it in the style, palette and texture of {styles}; copy no "
    "objects from them. {prompt}"
)


class Parts(StrictModel):
    """The `model:` mapping. Parts that are left out are those of the named model, if `base` is one.

    A part is a local folder or a hub id, OWNER/NAME, optionally with a folder in the repository:
    h94/IP-Adapter/models."""

    base: str = Field(
        min_length=1,
        description="FLUX.2 [klein] or Stable Diffusion 1.x, 2.x or XL in diffusers' format; a single-file "
        "checkpoint of Stable Diffusion, FILE.safetensors; or flux2-klein, flux2-klein-base, sd15, sdxl",
    )
    config: str | None = Field(
        default=None,
        description="how a single-file base is built: a folder or hub id in diffusers' format, of which only "
        "small files are read; default: that of sd15 or sdxl, by the kind of file",
    )
    controlnet: str | list[str] | None = Field(
        default=None, description="for the query's layout; a list for several"
    )
    ip_adapter: str | None = Field(
        default=None, description="for the contexts: the folder that holds ip_adapter_weight_name"
    )
    ip_adapter_weight_name: str | None = Field(default=None, description="a .safetensors file in ip_adapter")
    image_encoder: str | None = Field(
        default=None, description="the CLIP vision model that the IP-Adapter was trained with"
    )
    vae: str | None = Field(default=None, description="replaces the one of base")
    safety_checker: str | None = Field(
        default=None,
        description="a StableDiffusionSafetyChecker of diffusers; sets the column `unsafe`; default for "
        "sd15: its own",
    )
    depth_estimator: str | None = Field(
        default=None,
        description="a transformers model for depth estimation, which computes the map of `control: depth`",
    )
    lora: str | list[str] | None = Field(
        default=None, description="LoRA files, FOLDER/NAME.safetensors, fused into base"
    )
    lora_scale: float | list[float] = Field(default=1.0, description="the scale of each fused LoRA")
    loras: dict[Annotated[str, Field(min_length=1)], str] = Field(
        default={},
        description="name: LoRA file; a row chooses one by its setting `lora`",
    )
    few_steps: FewStepsName | None = Field(
        default=None,
        description="a published LoRA that makes SD 1.5 (lcm, hyper) or SDXL generate in 4 steps, with its "
        "scheduler and guidance as defaults",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    variant: str | None = Field(
        default=None, description="the variant of the weight files that is loaded on a GPU, such as fp16"
    )
    revision: dict[str, str] = Field(
        default={}, description="hub id: commit; default: the newest commit when the job is planned"
    )
    clip_skip: int | None = Field(
        default=None, ge=1, le=4, description="how many of the text encoder's last layers are skipped"
    )
    prompt_chunks: int = Field(
        default=1, ge=1, le=8, description="prompts may have up to this many chunks of 75 tokens"
    )
    normalization: NormalizationKind = Field(
        default="none", description="normalisation of context images; none: the encoder's own mean and std"
    )
    max_reference_pixels: int = Field(
        default=1024**2,
        ge=128**2,
        le=2048**2,
        description="FLUX.2: query and contexts are scaled down to at most this many pixels each; fewer are "
        "quicker",
    )
    prompt_template: str = Field(
        default=PROMPT_TEMPLATE,
        description="FLUX.2: the text that the model reads; {prompt} is the row's prompt, {styles} the "
        'numbers of the contexts, "image 2" or "images 2 to 3"; the query is image 1',
    )

    @property
    def controlnets(self) -> list[str]:
        """The ControlNets as a list."""
        return [self.controlnet] if isinstance(self.controlnet, str) else self.controlnet or []

    @property
    def fused_loras(self) -> list[tuple[str, float]]:
        """The LoRA files that are fused into the base, with their scales."""
        files = [self.lora] if isinstance(self.lora, str) else self.lora or []
        scales = self.lora_scale if isinstance(self.lora_scale, list) else [self.lora_scale] * len(files)
        return list(zip(files, scales, strict=True))

    @property
    def configuration(self) -> str:
        """The part whose small files say how the base is built."""
        return self.config or self.base

    @property
    def lora_files(self) -> list[str]:
        """All LoRA files."""
        return [*(file for file, _ in self.fused_loras), *self.loras.values()]

    @property
    def all(self) -> list[str]:
        """All parts that files are read from."""
        single = [
            self.config,
            self.ip_adapter,
            self.image_encoder,
            self.vae,
            self.safety_checker,
            self.depth_estimator,
        ]
        return [part for part in (self.base, *self.controlnets, *single, *self.lora_files) if part]

    @field_validator("prompt_template")
    @classmethod
    def _template_has_its_fields(cls, value: str) -> str:
        try:
            fields = [field[1:] for field in string.Formatter().parse(value) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"prompt_template {value!r}: {error}") from None
        known = [("prompt", "", None), ("styles", "", None)]  # without a format and a conversion
        if known[0] not in fields or not all(field in known for field in fields):
            raise ValueError(
                f"prompt_template {value!r}: expected {{prompt}} and, if wanted, {{styles}}, no other field"
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.ip_adapter is None) != (self.ip_adapter_weight_name is None) and self.base not in (
            "sd15",
            "sdxl",
        ):
            raise ValueError(
                "ip_adapter and ip_adapter_weight_name must be given together: a folder and a .safetensors "
                "file in it"
            )
        if self.ip_adapter_weight_name and not self.ip_adapter_weight_name.endswith(".safetensors"):
            raise ValueError(
                f"ip_adapter_weight_name {self.ip_adapter_weight_name!r}: only .safetensors files are "
                "loaded, no pickles"
            )
        count = 1 if isinstance(self.lora, str) else len(self.lora or [])
        if isinstance(self.lora_scale, list) and len(self.lora_scale) != count:
            raise ValueError(f"lora_scale has {len(self.lora_scale)} values for {count} files of lora")
        for file in self.lora_files:
            if not file.endswith(".safetensors"):
                raise ValueError(f"lora {file!r}: only .safetensors files are loaded, no pickles")
        return self


LICENCES = {  # by hub id, from the models' cards
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML Open RAIL-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "black-forest-labs/FLUX.2-klein-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-4B": "Apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "FLUX Non-Commercial License",
    "black-forest-labs/FLUX.2-klein-base-9B": "FLUX Non-Commercial License",
}
IP_ADAPTER = {"h94/IP-Adapter": "018e402774aeeddd60609b4ecdb7e298259dc729"}
PRESETS: dict[str, Parts] = {
    "flux2-klein": Parts(
        base="black-forest-labs/FLUX.2-klein-4B",
        revision={"black-forest-labs/FLUX.2-klein-4B": "e7b7dc27f91deacad38e78976d1f2b499d76a294"},
    ),
    "flux2-klein-base": Parts(base="black-forest-labs/FLUX.2-klein-base-4B"),
    "sd15": Parts(
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        controlnet="lllyasviel/control_v11p_sd15_canny",
        ip_adapter="h94/IP-Adapter/models",
        ip_adapter_weight_name="ip-adapter-plus_sd15.safetensors",
        image_encoder="h94/IP-Adapter/models/image_encoder",
        safety_checker="stable-diffusion-v1-5/stable-diffusion-v1-5/safety_checker",
        variant="fp16",
        revision=IP_ADAPTER
        | {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            "lllyasviel/control_v11p_sd15_canny": "115a470d547982438f70198e353a921996e2e819",
        },
    ),
    "sdxl": Parts(
        base="stabilityai/stable-diffusion-xl-base-1.0",
        controlnet="diffusers/controlnet-canny-sdxl-1.0",
        ip_adapter="h94/IP-Adapter/sdxl_models",
        ip_adapter_weight_name="ip-adapter-plus_sdxl_vit-h.safetensors",
        image_encoder="h94/IP-Adapter/models/image_encoder",
        vae="madebyollin/sdxl-vae-fp16-fix",
        variant="fp16",
        revision=IP_ADAPTER
        | {
            "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
            "diffusers/controlnet-canny-sdxl-1.0": "eb115a19a10d14909256db740ed109532ab1483c",
            "madebyollin/sdxl-vae-fp16-fix": "207b116dae70ace3637169f1ddd2434b91b3a8cd",
        },
    ),
}


def parts_of(model: str | Parts) -> Parts:
    """Return all parts of a model: those of the named model, replaced by those of the mapping."""
    parts = Parts(base=model) if isinstance(model, str) else model
    preset = PRESETS.get(parts.base)
    if preset is None:
        return parts
    replaced = {name: getattr(parts, name) for name in parts.model_fields_set - {"base"}}
    return preset.model_copy(update=replaced | {"revision": preset.revision | parts.revision})


def refuse_parts(parts: Parts, names: Iterable[str], what: str) -> None:
    """Raise ModelError for the first of the named parts that is given. what: the kind of model."""
    for name in names:
        if getattr(parts, name) != Parts.model_fields[name].default:
            raise ModelError(f"model: {name} does not apply to {what}, which {parts.base} is: leave it out")


def check_chunk(chunk: int | None, kind: ModelKind, on_cpu: bool) -> None:
    """Check a job's chunk before the model is loaded, as far as the device is known then.

    on_cpu: the job's engines do without GPUs; else they may be on either. Raises ConfigError for a chunk that
    none of the tables has."""
    tables = {
        device: sizes
        for (of_kind, device), sizes in CHUNKS.items()
        if of_kind == kind and not (on_cpu and device != "cpu")
    }
    if chunk is None or any(chunk in sizes for sizes in tables.values()):
        return
    known = "; ".join(
        f"{kind} on {device}: {', '.join(map(str, sorted(sizes)))}" for device, sizes in tables.items()
    )
    raise ConfigError(f"cluster.chunk: {chunk} is not a size of a chunk; sizes in lanes: {known}")
