"""The job file of `kind: evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import (
    KIND,
    Fit,
    Limits,
    OutputFolder,
    StorageOptions,
    StrictModel,
    known_columns,
)
from context_diffusion.core.schema import ScoreName


class EvaluateJob(StrictModel):
    """kind: evaluate. Reads finished images of any system and writes scores.parquet and summary.json."""

    kind: Literal["evaluate"] = Field(description=KIND)
    images: str = Field(
        min_length=1,
        description="the OUTPUT folder of a generate job, or with `manifest` any folder of images",
    )
    manifest: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="the rows that the images were generated from; default: the rows of OUTPUT"
    )
    compare: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="another system's images of the same rows: an OUTPUT, or with `manifest` any folder",
    )
    reference: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="images to measure distances to: a folder with its sub-folders, or an OUTPUT",
    )
    output: OutputFolder = Field(description="folder for scores.parquet and summary.json, a path or URL")
    score: Annotated[list[ScoreName], Field(min_length=1)] = Field(
        default=["layout", "style", "similarity", "prompt", "leakage"], description="the scores"
    )
    judge: str = Field(
        default="bundled",
        min_length=1,
        description="the model of the prompt score: bundled, or the folder or hub id of a CLIP model",
    )
    encoder: str = Field(
        default="bundled",
        min_length=1,
        description="the encoder of similarity and distances: bundled, a native model's folder, or CLIP, "
        "SigLIP or DINOv2",
    )
    columns: Annotated[
        dict[str, str], known_columns("id", "query", "context", "prompt", "image", "reference")
    ] = Field(
        default={},
        description="mapping of column names: ours -> the manifest's; `image`: the image file, default "
        "ID.png, ID.jpg, "
        "...; `reference`: replaces the key",
    )
    fit: Fit = Field(
        default="crop", description="how a query is fitted to its image's size; rows of OUTPUT have their own"
    )
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="URI prefixes that rows may read; default: the manifest's folder, or those of "
        "OUTPUT's job",
    )
    storage_options: StorageOptions = Field(
        default={}, description="fsspec options per protocol, without secrets"
    )
    limits: Limits = Field(default=Limits(), description="limits of what a row may ask for")

    @model_validator(mode="after")
    def _references_in_one_place(self) -> Self:
        if "reference" in self.columns and (self.reference or not self.manifest):
            raise ValueError("columns: `reference` needs `manifest` and excludes the key `reference`")
        return self

    @property
    def manifests(self) -> list[str]:
        """The manifest as a list."""
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest or []
