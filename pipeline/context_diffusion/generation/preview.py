"""A grid of one row's pictures over some of its settings, made in this process as the job's run would make them. No Ray."""

from __future__ import annotations

import itertools
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
from context_diffusion.generation.local_model import Maker, inputs_of
from context_diffusion.generation.stages import LoadImages, requests_of
from context_diffusion.inputs.manifest_files import Row, expand, open_file, scan_parquet, scan_text
from context_diffusion.inputs.rows import column_names, read_table, row_id
from context_diffusion.models.defaults import resolved_job
from context_diffusion.models.resolve import find_model
from context_diffusion.outputs.contact_sheet import Cell
from context_diffusion.storage.filesystem import Storage

MOST = 144  # pictures of a grid
VARIED = tuple(name for name in SETTINGS if name != "num_images")  # a cell is one picture
Axis = tuple[str, list[Any]]  # a row setting and its values


def axes_of(texts: list[str]) -> list[Axis]:
    """`guidance_scale=1,3,5` -> the setting and its values. Raises ConfigError."""
    axes: list[Axis] = []
    for text in texts:
        name, equals, listed = text.partition("=")
        if not equals or not listed:
            raise ConfigError(f"--grid {text}: write setting=value,value: guidance_scale=1,3,5")
        if name not in VARIED:
            hint = did_you_mean(name, VARIED)
            raise ConfigError(f"--grid {text}: {name!r} is no setting that a grid can vary; {hint}")
        if name in dict(axes):
            raise ConfigError(f"--grid {text}: {name} stands twice")
        try:
            axes.append((name, parse(f"[{listed}]")))
        except yaml.YAMLError as error:
            raise ConfigError(f"--grid {text}: the values are not YAML: {error}") from error
    if len(axes) not in (1, 2):
        raise ConfigError(f"--grid takes one setting or two, columns and lines, not {len(axes)}")
    if (cells := len(axes[0][1]) * len(axes[-1][1] if axes[1:] else [0])) > MOST:
        raise ConfigError(f"--grid: {cells} pictures, at most {MOST} make a grid")
    return axes


def setting_grid(job: GenerateJob, axes: list[Axis], wanted: str | None) -> tuple[str, list[list[Cell]]]:
    """One row's pictures, a column for each value of the first setting, a line for each of the second, below its query and
    contexts. wanted: the row's id, else the first. -> the id, rows of a sheet. Raises JobError."""
    storage, model = Storage(job.storage_options), find_model(job.model)
    job = resolved_job(job, model.defaults)
    uri, raw = _find_row(job, storage, wanted)
    names = column_names(job)
    (across, columns), (down, lines) = axes[0], axes[1] if axes[1:] else ("", [None])
    row = raw | {names[ID]: row_id(raw, names), names["num_images"]: 1}  # a seed may follow from the id
    varied = [row | {names[across]: x} | ({names[down]: y} if down else {}) for y, x in itertools.product(lines, columns)]
    load = LoadImages(job, _allowed(job, storage), model.image_size, model.contexts, storage)
    table = load(read_table(varied, 0, job, parent(uri), pa.schema([])))
    for told, changed in zip(table.to_pylist(), varied, strict=True):
        if told["error_code"]:
            where = ", ".join(f"{name}={changed[names[name]]}" for name, _ in axes)
            raise JobError(f"row {told[ID]!r} with {where}: {told['error_code']}: {told['error_message']}")
    requests = [one for [one] in requests_of(table, job)]
    made = iter(_images(Maker(job, model), requests))
    cells = [[(_label(across, x, down, y), next(made)) for x in columns] for y in lines]
    return requests[0].id, [inputs_of(requests[0]), *cells]


def _label(across: str, x: Any, down: str, y: Any) -> str:
    return f"{across} {x}" + (f" {down} {y}" if down else "")


def _images(maker: Maker, requests: list[Request]) -> list[Pixels]:
    """Raises JobError for one that fails."""
    outcomes = maker.make(requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, Failure):
            raise JobError(f"row {request.id!r}: {outcome.code}: {outcome.message}")
    return [outcome.image for outcome in outcomes if isinstance(outcome, Result)]


def _find_row(job: GenerateJob, storage: Storage, wanted: str | None) -> tuple[str, Row]:
    """-> the manifest's file and the row. Raises ManifestError."""
    names = column_names(job)
    for uri in expand(job.manifests, storage):
        file = open_file(uri, storage)
        rows = scan_parquet(file, storage, None) if file.format == "parquet" else (row for *_, row in scan_text(file, storage))
        for row in rows:
            if wanted is None or row_id(row, names) == wanted:
                return uri, row
    what = "has no rows" if wanted is None else f"has no row {wanted!r}"
    raise ManifestError(f"{', '.join(job.manifests)}: the manifest {what}")


def _allowed(job: GenerateJob, storage: Storage) -> list[str]:
    return job.allow or [parent(uri) for uri in expand(job.manifests, storage)]
