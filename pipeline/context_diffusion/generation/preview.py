"""Generate one row at several settings in this process, with the images that the job's run would have but for
the last bits, since the calls of the model are smaller here. Knows no Ray."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyarrow as pa
import yaml

from context_diffusion.core.errors import ConfigError, JobError, ManifestError
from context_diffusion.core.generate_job import GenerateJob
from context_diffusion.core.job_file import parse
from context_diffusion.core.records import Failure, Pixels, Request, Result
from context_diffusion.core.schema import ID, SETTINGS
from context_diffusion.core.settings import did_you_mean
from context_diffusion.core.uris import parent
from context_diffusion.generation.local_model import LocalModel, inputs_of
from context_diffusion.generation.stages.generate import requests_of
from context_diffusion.generation.stages.load_images import LoadImages
from context_diffusion.generation.stages.read_shard import row_rules
from context_diffusion.inputs.manifest_files import expand, open_file, raw_rows
from context_diffusion.inputs.rows import read_table, row_id
from context_diffusion.inputs.text_rows import Row
from context_diffusion.inputs.url_policy import allowed_prefixes
from context_diffusion.models.resolution.defaults import resolved_job
from context_diffusion.models.resolution.resolve import find_model
from context_diffusion.outputs.contact_sheet import Cell
from context_diffusion.storage.filesystem import Storage

MAX_CELLS = 144
VARIED = tuple(name for name in SETTINGS if name != "num_images")  # a cell holds one image
Axis = tuple[str, list[Any]]  # a row setting and its values


def axes_of(texts: list[str]) -> list[Axis]:
    """Parse texts such as `guidance_scale=1,3,5` into settings and values. Raises ConfigError."""
    axes: list[Axis] = []
    for text in texts:
        name, equals, listed = text.partition("=")
        if not equals or not listed:
            raise ConfigError(f"--grid {text}: expected setting=value,value, such as guidance_scale=1,3,5")
        if name not in VARIED:
            hint = did_you_mean(name, VARIED)
            raise ConfigError(f"--grid {text}: {name!r} is not a setting that a grid can vary; {hint}")
        if name in dict(axes):
            raise ConfigError(f"--grid {text}: {name} is given twice")
        try:
            axes.append((name, parse(f"[{listed}]")))
        except yaml.YAMLError as error:
            raise ConfigError(f"--grid {text}: the values are not YAML: {error}") from error
    if len(axes) not in (1, 2):
        raise ConfigError(f"--grid takes one or two settings (columns, then rows), not {len(axes)}")
    if (cells := math.prod(len(values) for _, values in axes)) > MAX_CELLS:
        raise ConfigError(f"--grid: {cells} images, at most {MAX_CELLS} are allowed")
    return axes


def setting_grid(job: GenerateJob, axes: list[Axis], row_name: str | None) -> tuple[str, list[list[Cell]]]:
    """Generate one row at each combination of the axes.

    row_name: the row's id; None takes the first row. Returns the id and the lines of a contact sheet: the
    query and the contexts, then a column for each value of the first axis and a line for each of the second.
    Raises JobError."""
    storage, model = Storage(job.storage_options), find_model(job.model)
    job = resolved_job(job.model_copy(update={"matrix": {}}), model.defaults)  # the grid takes its place
    rules = row_rules(job, model)
    uri, raw = _find_row(job, rules.names, storage, row_name)
    variants = _variants(raw, rules.names, axes)
    allow = allowed_prefixes(job.allow, expand(job.manifests, storage))
    table = LoadImages.for_job(job, model, allow, storage)(
        read_table(variants, 0, rules, parent(uri), pa.schema([]))
    )
    for row, variant in zip(table.to_pylist(), variants, strict=True):
        if row["error_code"]:
            where = ", ".join(f"{name}={variant[rules.names[name]]}" for name, _ in axes)
            raise JobError(f"row {row[ID]!r} with {where}: {row['error_code']}: {row['error_message']}")
    requests = [request for [request] in requests_of(table, job.control_kinds, job.matrix)]
    images = iter(_images(LocalModel(model, job.cluster.cpu_threads), requests))
    lines = [[(_label(point), next(images)) for point in points] for points in _points(axes)]
    return requests[0].id, [inputs_of(requests[0]), *lines]


def _points(axes: list[Axis]) -> list[list[dict[str, Any]]]:
    """Return the settings of each cell, line by line."""
    (across, columns), *down = axes
    lines = [{name: value} for name, values in down for value in values] or [{}]
    return [[{across: value} | line for value in columns] for line in lines]


def _variants(raw: Row, names: dict[str, str], axes: list[Axis]) -> list[Row]:
    """Return the raw row with each cell's settings. The id is kept, since a seed may be derived from it."""
    row = raw | {names[ID]: row_id(raw, names), names["num_images"]: 1}
    points = itertools.chain.from_iterable(_points(axes))
    return [row | {names[name]: value for name, value in point.items()} for point in points]


def _label(point: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in point.items())


def _images(model: LocalModel, requests: list[Request]) -> list[Pixels]:
    """Generate the images. Raises JobError for one that fails."""
    outcomes = model.generate(requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, Failure):
            raise JobError(f"row {request.id!r}: {outcome.code}: {outcome.message}")
    return [outcome.image for outcome in outcomes if isinstance(outcome, Result)]


def _find_row(
    job: GenerateJob, names: dict[str, str], storage: Storage, row_name: str | None
) -> tuple[str, Row]:
    """Return the manifest file and the raw row. Raises ManifestError."""
    for uri in expand(job.manifests, storage):
        for row in raw_rows(open_file(uri, storage), storage):
            if row_name is None or row_id(row, names) == row_name:
                return uri, row
    missing = "has no rows" if row_name is None else f"has no row {row_name!r}"
    raise ManifestError(f"{', '.join(job.manifests)}: the manifest {missing}")
