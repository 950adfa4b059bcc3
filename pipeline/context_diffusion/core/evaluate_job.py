"""The job file of `kind: evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import KIND, Fit, Limits, OutputFolder, StorageOptions, StrictModel, known_columns
from context_diffusion.core.schema import ScoreName


class EvaluateJob(StrictModel):
    """kind: evaluate. Finished pictures in, ours or another system's; scores.parquet and summary.json out."""

    kind: Literal["evaluate"] = Field(description=KIND)
    images: str = Field(
        min_length=1, description="the OUTPUT folder of a generate job, or with `manifest` any folder of pictures"
    )
    manifest: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="what the pictures were made from; left out: what OUTPUT's rows say"
    )
    compare: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="another system's pictures of the same rows: an OUTPUT, or with `manifest` any folder"
    )
    reference: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="pictures to measure distances to: a folder and those below it, or an OUTPUT"
    )
    output: OutputFolder = Field(description="folder for scores.parquet and summary.json, a path or URL")
    score: Annotated[list[ScoreName], Field(min_length=1)] = Field(
        default=["layout", "style", "similarity", "prompt", "leakage"], description="which scores"
    )
    judge: str = Field(default="bundled", min_length=1, description="of prompts: bundled, or a CLIP model's folder or hub id")
    encoder: str = Field(
        default="bundled",
        min_length=1,
        description="of similarity and of distances: bundled, a native model's folder, or CLIP, SigLIP, DINOv2",
    )
    columns: Annotated[dict[str, str], known_columns("id", "query", "context", "prompt", "image", "reference")] = Field(
        default={},
        description="our column name -> the manifest's; `image`: a picture's file, left out: ID.png, ID.jpg, ...; `reference`: "
        "in place of the key",
    )
    fit: Fit = Field(default="crop", description="how a query meets its picture's size; OUTPUT's rows say it themselves")
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="URI prefixes that rows may read; left out: the manifest's folder, or what OUTPUT's job allowed"
    )
    storage_options: StorageOptions = Field(default={}, description="fsspec options by protocol, no secrets")
    limits: Limits = Field(default=Limits(), description="what a row may ask for")

    @model_validator(mode="after")
    def _references_in_one_place(self) -> Self:
        if "reference" in self.columns and (self.reference or not self.manifest):
            raise ValueError("columns: `reference` names a column of `manifest:`, and takes the place of the key `reference`")
        return self

    @property
    def manifests(self) -> list[str]:
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest or []
