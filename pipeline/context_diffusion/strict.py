"""What all models of a job file are made of, and the mapping of a pretrained model's parts. Knows nothing but pydantic."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NormalizationKind = Literal["none", "image", "channel"]


def writable_url(url: str) -> str:
    """Raises ValueError where nothing can be written by its protocol."""
    if re.match("https?://", url, re.IGNORECASE):
        raise ValueError("http:// can only be read; write to a folder of this machine, to s3://, gs:// or az://")
    return url


OutputFolder = Annotated[str, Field(min_length=1), AfterValidator(writable_url)]


class StrictModel(BaseModel):
    """Frozen; unknown keys and wrong types are errors, never guessed at."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Parts(StrictModel):
    """The `model:` mapping. What is left out comes from the preset that `base` names, if it names one.

    A part is a folder, or a hub id, OWNER/NAME, with a folder in it behind further slashes: h94/IP-Adapter/models.
    """

    base: str = Field(min_length=1, description="Stable Diffusion 1.x, 2.x or XL in diffusers' format; or sd15, sdxl")
    controlnet: str | list[str] | None = Field(default=None, description="for the query; a list: several")
    ip_adapter: str | None = Field(default=None, description="for the contexts, the folder of ip_adapter_weight_name")
    ip_adapter_weight_name: str | None = Field(default=None, description="a .safetensors file in ip_adapter")
    image_encoder: str | None = Field(default=None, description="the CLIP vision model that the IP-Adapter was made with")
    vae: str | None = Field(default=None, description="in place of base's")
    safety_checker: str | None = Field(
        default=None, description="diffusers' StableDiffusionSafetyChecker, its verdict is the column `unsafe`; sd15 has its own"
    )
    lora: str | list[str] | None = Field(default=None, description="LoRA files, FOLDER/NAME.safetensors, fused into base")
    lora_scale: float | list[float] = Field(default=1.0, description="of each LoRA")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    variant: str | None = Field(default=None, description="of the files on a GPU, as fp16")
    revision: dict[str, str] = Field(default={}, description="hub id: commit; left out: the newest at the plan")
    clip_skip: int | None = Field(default=None, ge=1, le=4, description="the text encoder's last layers left out")
    prompt_chunks: int = Field(default=1, ge=1, le=8, description="prompts of up to so many times 75 tokens")
    normalization: NormalizationKind = Field(default="none", description="of contexts; none: CLIP's own constants")

    @property
    def controlnets(self) -> list[str]:
        return [self.controlnet] if isinstance(self.controlnet, str) else self.controlnet or []

    @property
    def loras(self) -> list[tuple[str, float]]:
        files = [self.lora] if isinstance(self.lora, str) else self.lora or []
        scales = self.lora_scale if isinstance(self.lora_scale, list) else [self.lora_scale] * len(files)
        return list(zip(files, scales, strict=True))

    @property
    def all(self) -> list[str]:
        """The parts that files are read of."""
        single = [self.ip_adapter, self.image_encoder, self.vae, self.safety_checker]
        return [part for part in (self.base, *self.controlnets, *single, *(name for name, _ in self.loras)) if part]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.ip_adapter is None) != (self.ip_adapter_weight_name is None) and self.base not in ("sd15", "sdxl"):
            raise ValueError("ip_adapter and ip_adapter_weight_name are given together: a folder and a .safetensors file in it")
        if self.ip_adapter_weight_name and not self.ip_adapter_weight_name.endswith(".safetensors"):
            raise ValueError(f"ip_adapter_weight_name {self.ip_adapter_weight_name!r}: safetensors files only, no pickles")
        for name, _ in self.loras:
            if not name.endswith(".safetensors"):
                raise ValueError(f"lora {name!r}: safetensors files only, no pickles")
        return self
