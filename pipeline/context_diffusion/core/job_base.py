"""The strict base model of job files and the fields that several kinds of job share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NormalizationKind = Literal["none", "image", "channel"]


def writable_url(url: str) -> str:
    """Validate that its protocol can be written. Raises ValueError."""
    if re.match("https?://", url, re.IGNORECASE):
        raise ValueError("http:// is read-only; use a local folder, s3://, gs:// or az://")
    return url


def problem_of(details: Mapping[str, Any]) -> str:
    """Return the message of one of pydantic's errors, without pydantic's own wording."""
    return str(details["msg"]).removeprefix("Value error, ").replace("Input should", "should")


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested keys to dotted names: {"settings": {"seed": 1}} -> {"settings.seed": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


OutputFolder = Annotated[str, Field(min_length=1), AfterValidator(writable_url)]


class StrictModel(BaseModel):
    """A frozen model in which unknown keys and wrong types are errors; no value is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Fit = Literal["crop", "pad", "stretch", "keep"]
KIND = "generate, train, finetune or evaluate"


class Limits(StrictModel):
    """The limits of what an untrusted manifest may ask for."""

    max_pixels: Annotated[int, Field(ge=1)] = Field(
        default=50_000_000, description="pixels of one input image"
    )
    max_bytes: Annotated[int, Field(ge=1)] = Field(default=64 * 2**20, description="bytes of one input file")
    max_contexts: Annotated[int, Field(ge=1)] = Field(default=64, description="context images of a row")
    max_prompt_characters: Annotated[int, Field(ge=1)] = Field(
        default=10_000, description="characters of a prompt"
    )


def known_columns(*known: str) -> AfterValidator:
    """Return a validator of `columns`: its keys must be among the known names."""

    def check(columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in known:
                raise ValueError(f"columns: unknown name {name!r}; expected one of {', '.join(known)}")
        return columns

    return AfterValidator(check)


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        if re.search(r"secret|token|password|^key$|access_key|credential", key, re.IGNORECASE):
            raise ValueError(
                f"{key!r} is a secret, and the job file is stored with the output; set it in the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or name a profile"
            )
        if isinstance(value, dict):
            _no_secrets(value)
    return options


StorageOptions = Annotated[dict[str, dict[str, Any]], AfterValidator(_no_secrets)]
