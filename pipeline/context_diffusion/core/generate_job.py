"""The job file's models: frozen and strict, checked once at the border.

Knows no files (core/job_file.py reads them) and nothing of Ray or torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from context_diffusion.core.job_base import (
    KIND,
    Fit,
    Limits,
    OutputFolder,
    StorageOptions,
    StrictModel,
    known_columns,
)
from context_diffusion.core.model_parts import Parts
from context_diffusion.core.schema import COLUMNS_BY_SCORE, ScoreName, columns_of
from context_diffusion.core.settings import Fraction, Settings
from context_diffusion.core.sweep import Matrix, check_combinations, checked_matrix

ControlName = Literal["none", "canny", "gray", "soft_edges", "disabled"]

ImageFormat = Literal["png", "webp", "jpeg", "none"]

OutputFormat = Literal["files", "parquet", "both", "webdataset"]

Actors = Annotated[int, Field(ge=1, le=10_000)]


class Cluster(StrictModel):
    """How the stages share the cluster."""

    actors: Actors | Annotated[list[Actors], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="engines, or [least, most]; left out: one for each GPU, also for those that join later, or one without any",
    )
    gpus_per_actor: Annotated[float, Field(ge=0, le=16)] | None = Field(
        default=None,
        description="a fraction shares a GPU, 0 runs on CPUs; left out: 1 where there are GPUs. Said here, GPUs are waited for",
    )
    accelerator_type: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="of the engines' nodes, by Ray's name: H100, A100, L4"
    )
    cpus_per_load: Annotated[float, Field(gt=0, le=64)] | None = Field(
        default=None, description="CPUs that a task which loads pictures reserves; left out: 1, less where CPUs are few"
    )
    num_cpus: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPUs of a Ray that is started here; left out: all"
    )
    cpu_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        default=2, description="calls of the model at once, in a CPU engine; pixels don't depend on it"
    )
    shards_per_actor: Annotated[int, Field(ge=1, le=64)] = Field(default=2, description="shards that feed one engine at once")
    no_progress_timeout_s: Annotated[int, Field(ge=10)] = Field(
        default=600, description="a flow that stands still for so long is ended with code 75"
    )

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        gpus = self.gpus_per_actor
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_actor ({gpus:g}) is a whole number, or less than 1 where engines share a GPU")
        if isinstance(self.actors, list) and self.actors[0] > self.actors[1]:
            raise ValueError(f"actors: the least ({self.actors[0]}) must not exceed the most ({self.actors[1]})")
        return self


def control_kinds(control: str | Sequence[str]) -> list[str]:
    """What a job's `control` says, as a list: none where no ControlNet runs."""
    kinds = [control] if isinstance(control, str) else list(control)
    return [] if kinds == ["disabled"] else kinds


class GenerateJob(StrictModel):
    """kind: generate. A manifest of rows in, an OUTPUT folder of Parquet and images out."""

    kind: Literal["generate"] = Field(description=KIND)
    manifest: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] = Field(
        description="Parquet, JSONL or CSV: a path, URL or glob, or a list of them"
    )
    output: OutputFolder = Field(description="the OUTPUT folder, a path or URL")
    model: Annotated[str, Field(min_length=1)] | Parts = Field(
        default="bundled", description="bundled, sd15, sdxl, a folder, a hub id, or a mapping of parts: see below"
    )
    control: ControlName | Annotated[list[ControlName], Field(min_length=1)] | None = Field(
        default=None,
        description="the query's control map, or one for each ControlNet; none: its own pixels, disabled: no ControlNet runs; "
        "default: the map that the model's ControlNet was trained on",
    )
    columns: Annotated[
        dict[str, str], known_columns("id", "query", "context", "prompt", "negative_prompt", *Settings.model_fields)
    ] = Field(default={}, description="our column name -> the manifest's")
    settings: Settings = Field(default=Settings(), description="defaults of the row settings, over the model's own")
    matrix: Matrix = Field(default={}, description="row setting -> values: an image of each row for every combination")
    rows_per_part: int = Field(
        default=64, ge=1, le=100_000, description="rows of a shard; small manifests and a matrix take fewer"
    )
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="URI prefixes that rows may read; default: the manifest's folder and below"
    )
    storage_options: StorageOptions = Field(
        default={}, description="fsspec options by protocol, no secrets: {s3: {endpoint_url: ...}}"
    )
    image_format: ImageFormat = Field(default="png", description="none: PNG in the Parquet only")
    output_format: OutputFormat = Field(
        default="files", description="where pictures lie: files, the Parquet's own column, both, or a WebDataset tar a part"
    )
    metadata: bool = Field(
        default=True,
        description="pictures carry id, prompt, settings, sources, model, and that a model made them; false: nothing but pixels",
    )
    fit: Fit = Field(default="crop", description="how a query meets the output's size; keep: its own aspect ratio")
    seed: int = Field(default=0, ge=0, lt=2**63, description="the rows' seeds are derived from it and their ids")
    score: list[ScoreName] = Field(default=[], description="scores of each image: layout, style, similarity, prompt, leakage")
    keep: Literal["all", "best"] = Field(default="all", description="which of a row's images; best: the one, by its `score`")
    thresholds: dict[str, Fraction] = Field(
        default={}, description="score column -> its least value, a leakage's greatest; beyond it a picture is `flagged`"
    )
    cluster: Cluster = Field(default=Cluster(), description="engines, CPUs, threads")
    limits: Limits = Field(default=Limits(), description="what a row may ask for")
    max_failed: Annotated[int, Field(ge=0)] | str | None = Field(
        default=None, description="failed rows that end the job: a number or a share, 5%"
    )

    @field_validator("max_failed")
    @classmethod
    def _number_or_share(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and not re.fullmatch(r"(100|\d{1,2})(\.\d+)?%", value):
            raise ValueError(f"max_failed is a number of rows or a share such as 5%, not {value!r}")
        return value

    @field_validator("matrix")
    @classmethod
    def _axes_are_settings(cls, value: Matrix) -> Matrix:
        return checked_matrix(value, Settings)

    @model_validator(mode="after")
    def _combinations_go_together(self) -> Self:
        check_combinations(self.settings, self.matrix)
        return self

    @model_validator(mode="after")
    def _no_pictures_in_two_minds(self) -> Self:
        if self.image_format == "none" and self.output_format not in ("files", "parquet"):
            raise ValueError(
                f"image_format: none means pictures in the Parquet only; for output_format: {self.output_format} choose png, "
                "webp or jpeg"
            )
        return self

    @model_validator(mode="after")
    def _scores_are_there(self) -> Self:
        columns = columns_of(self.score)
        if self.keep == "best" and not columns:
            raise ValueError(f"keep: best needs `score`, what is best: a list of {', '.join(COLUMNS_BY_SCORE)}")
        for column in self.thresholds:
            if column not in columns:
                there = f"its `score` gives {', '.join(columns)}" if columns else "it has no `score`"
                raise ValueError(f"thresholds: the job has no column {column!r}, {there}")
        return self

    @property
    def picture_format(self) -> Literal["png", "webp", "jpeg"]:
        return "png" if self.image_format == "none" else self.image_format

    @property
    def pictures_in(self) -> OutputFormat:
        return "parquet" if self.image_format == "none" else self.output_format

    @property
    def control_kinds(self) -> list[str]:
        """The map of each ControlNet that runs, once models/defaults.py has filled `control` in."""
        assert self.control is not None, "resolved_job comes first"
        return control_kinds(self.control)

    @property
    def manifests(self) -> list[str]:
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest

    def failures_allowed(self, rows: int) -> int:
        """Failed rows that the job of so many rows may have."""
        if self.max_failed is None:
            return rows
        if isinstance(self.max_failed, str):
            return int(rows * float(self.max_failed.rstrip("%")) / 100)
        return self.max_failed

    def pixel_keys(self) -> dict[str, Any]:
        """The keys that change pixels or the cut into shards: OUTPUT belongs to one set of them."""
        keys = {
            "manifest",
            "model",
            "control",
            "columns",
            "settings",
            "rows_per_part",
            "image_format",
            "output_format",
            "fit",
            "seed",
            "keep",
        }
        chosen = self.model_dump(mode="json", include=keys | {"limits", "allow"})
        if self.keep == "best":
            chosen["score"] = sorted(self.score)
        axes = [[name, values] for name, values in self.matrix.items()]  # a list, for their order gives the index
        return chosen | {"matrix": axes}
