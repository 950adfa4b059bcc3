"""The job file of `kind: generate`. Reads no files (core/job_file.py does) and knows no Ray or torch."""

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
from context_diffusion.core.schema import COLUMNS_BY_SCORE, MANIFEST_COLUMNS, ScoreName, columns_of
from context_diffusion.core.settings import Fraction, Settings
from context_diffusion.core.sweep import Matrix, check_combinations, checked_matrix

ControlName = Literal[
    "none",
    "canny",
    "gray",
    "soft_edges",
    "tile",
    "depth",
    "lineart",
    "openpose",
    "normal",
    "segment",
    "disabled",
]
ImageFormat = Literal["png", "webp", "jpeg", "none"]
OutputFormat = Literal["files", "parquet", "both", "webdataset"]
Actors = Annotated[int, Field(ge=1, le=10_000)]


class Cluster(StrictModel):
    """How the stages share the cluster's resources."""

    actors: Actors | Annotated[list[Actors], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="number of engines, or [min, max]; default: one per GPU, also of nodes that join later, "
        "or one without GPUs",
    )
    gpus_per_actor: Annotated[float, Field(ge=0, le=16)] | None = Field(
        default=None,
        description="GPUs per engine: a fraction shares a GPU, 0 uses CPUs; default: 1 if there are GPUs; "
        "if set, the job waits for GPUs",
    )
    accelerator_type: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Ray's name of the accelerator of the engines' nodes: H100, A100, L4"
    )
    cpus_per_load: Annotated[float, Field(gt=0, le=64)] | None = Field(
        default=None,
        description="CPUs that a loading task reserves; default: 1, less where there are few CPUs",
    )
    num_cpus: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="CPUs of a Ray instance that the job starts; default: all"
    )
    cpu_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        default=2, description="concurrent model calls of a CPU engine; does not affect pixels"
    )
    chunk: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="lanes in one call of the model, an image takes 1 to 3; fewer need less memory; default: "
        "by model and device",
    )
    max_wait_steps: Annotated[int, Field(ge=1)] = Field(
        default=500,
        description="denoising steps for which an engine may pass over its oldest row to fill its calls with "
        "rows of another size",
    )
    compile: Literal["auto", "off"] = Field(
        default="off",
        description="auto: compile the model on GPUs, which takes minutes when an engine starts and needs "
        "Triton and a C compiler",
    )
    offload: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: where a GPU has no room for all of a FLUX.2, its text encoder is in main memory "
        "while it is not used",
    )
    shards_per_actor: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None,
        description="shards that one engine works on at once; default: 2, or 8 where rows vary in what calls "
        "need in common (a column of width, height, lora, lora_scale or context_masks, `fit: keep` without a "
        "size in `settings`, or FLUX.2), so that each kind fills its calls",
    )
    no_progress_timeout_s: Annotated[int, Field(ge=10)] = Field(
        default=600, description="seconds without progress after which the job ends with exit code 75"
    )

    @model_validator(mode="after")
    def _gpus_are_whole_or_shared(self) -> Self:
        gpus = self.gpus_per_actor
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"gpus_per_actor ({gpus:g}) must be a whole number, or less than 1 for engines that "
                "share a GPU"
            )
        if isinstance(self.actors, list) and self.actors[0] > self.actors[1]:
            raise ValueError(
                f"actors: the minimum ({self.actors[0]}) must not exceed the maximum ({self.actors[1]})"
            )
        return self


def control_kinds(control: str | Sequence[str]) -> list[str]:
    """Return a job's `control` as a list; empty where no ControlNet runs."""
    kinds = [control] if isinstance(control, str) else list(control)
    return [] if kinds == ["disabled"] else kinds


class GenerateJob(StrictModel):
    """kind: generate. Reads a manifest of rows and writes an OUTPUT folder of Parquet and images."""

    kind: Literal["generate"] = Field(description=KIND)
    manifest: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] = Field(
        description="Parquet, JSONL or CSV: a path, URL or glob, or a list of them"
    )
    output: OutputFolder = Field(description="the OUTPUT folder, a path or URL")
    model: Annotated[str, Field(min_length=1)] | Parts = Field(
        default="bundled",
        description="bundled, flux2-klein, flux2-klein-base, sdxl, sd15, a folder, a hub id, a single-file "
        "checkpoint of Stable Diffusion (FILE.safetensors), or a mapping of parts",
    )
    control: ControlName | Annotated[list[ControlName], Field(min_length=1)] | None = Field(
        default=None,
        description="the control map, or one per ControlNet: none (the query itself), canny, gray, "
        "soft_edges and tile are computed from the query, depth by `model.depth_estimator`; lineart, "
        "openpose, normal and segment are given in `control_image`; disabled: no ControlNet runs; default: "
        "the map that the model's ControlNet was trained on",
    )
    columns: Annotated[
        dict[str, str],
        known_columns(*MANIFEST_COLUMNS),
    ] = Field(default={}, description="mapping of column names: name here -> name in the manifest")
    settings: Settings = Field(default=Settings(), description="default row settings; override the model's")
    matrix: Matrix = Field(
        default={}, description="row setting -> list of values: every combination is generated for each row"
    )
    rows_per_part: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="rows per shard and part; fewer for small manifests and with a matrix",
    )
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="URI prefixes that rows may read; default: the folders of the manifest files"
    )
    storage_options: StorageOptions = Field(
        default={}, description="fsspec options per protocol, without secrets: {s3: {endpoint_url: ...}}"
    )
    image_format: ImageFormat = Field(
        default="png", description="file format of images; none: PNG in the Parquet column only"
    )
    output_format: OutputFormat = Field(
        default="files",
        description="where images are stored: files, a Parquet column, both, or one WebDataset tar per part",
    )
    metadata: bool = Field(
        default=True,
        description="image files hold id, prompt, settings, sources, model and a note that they are "
        "generated; false: only pixels",
    )
    fit: Fit = Field(
        default="crop",
        description="how a query is fitted to the output's size; keep: the query's aspect ratio; FLUX.2 "
        "reads the query whole",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="the seeds of rows are derived from it and their ids"
    )
    score: list[ScoreName] = Field(
        default=[], description="scores of each image: layout, style, similarity, prompt, leakage"
    )
    keep: Literal["all", "best"] = Field(
        default="all", description="which images of a row are written; best: the one with the best `score`"
    )
    thresholds: dict[str, Fraction] = Field(
        default={},
        description="score column -> minimum, for leakages the maximum; other images are `flagged`",
    )
    cluster: Cluster = Field(default=Cluster(), description="engines, CPUs and threads")
    limits: Limits = Field(default=Limits(), description="limits of what a row may ask for")
    max_failed: Annotated[int, Field(ge=0)] | str | None = Field(
        default=None, description="end the job if more rows fail: a number, or a percentage such as 5%"
    )

    @field_validator("max_failed")
    @classmethod
    def _number_or_share(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and not re.fullmatch(r"(100|\d{1,2})(\.\d+)?%", value):
            raise ValueError("should be a number of rows or a percentage such as 5%")
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
    def _formats_agree(self) -> Self:
        if self.image_format == "none" and self.output_format not in ("files", "parquet"):
            raise ValueError(
                f"image_format: none stores images in the Parquet only; output_format: {self.output_format} "
                "needs png, webp or jpeg"
            )
        return self

    @model_validator(mode="after")
    def _scores_exist(self) -> Self:
        columns = columns_of(self.score)
        if self.keep == "best" and not columns:
            raise ValueError(f"keep: best needs `score`: a list of {', '.join(COLUMNS_BY_SCORE)}")
        for column in self.thresholds:
            if column not in columns:
                known = f"its `score` has {', '.join(columns)}" if columns else "it has no `score`"
                raise ValueError(f"thresholds: the job has no column {column!r}; {known}")
        return self

    @property
    def file_format(self) -> Literal["png", "webp", "jpeg"]:
        """The format of the image bytes, wherever they are stored."""
        return "png" if self.image_format == "none" else self.image_format

    @property
    def images_in(self) -> OutputFormat:
        """Where images are stored."""
        return "parquet" if self.image_format == "none" else self.output_format

    @property
    def control_kinds(self) -> list[str]:
        """The map of each ControlNet that runs. models.defaults.resolved_job must have filled in
        `control`."""
        assert self.control is not None, "resolved_job must be called first"
        return control_kinds(self.control)

    @property
    def manifests(self) -> list[str]:
        """The manifest as a list."""
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest

    def failures_allowed(self, rows: int) -> int:
        """Return how many of the job's rows may fail."""
        if self.max_failed is None:
            return rows
        if isinstance(self.max_failed, str):
            return int(rows * float(self.max_failed.rstrip("%")) / 100)
        return self.max_failed

    def pixel_keys(self) -> dict[str, Any]:
        """Return the keys that affect pixels or shards. OUTPUT belongs to one set of their values."""
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
        values = self.model_dump(mode="json", include=keys | {"limits", "allow"})
        if self.keep == "best":
            values["score"] = sorted(self.score)
        # a list, since their order gives the index
        axes = [[name, axis] for name, axis in self.matrix.items()]
        return values | {"matrix": axes}
