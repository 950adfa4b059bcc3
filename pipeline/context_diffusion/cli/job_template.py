"""Writes the commented job file of `init`, and the manifest that it names. Decodes no images."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from context_diffusion.core.errors import JobError
from context_diffusion.core.job_file import check_job, parse
from context_diffusion.core.uris import normal, parent
from context_diffusion.inputs.from_folders import Pairing, write_manifest
from context_diffusion.models.resolution.resolve import check_name
from context_diffusion.outputs.output_folder import Output
from context_diffusion.storage.filesystem import Storage

PAIRED = {
    "all": "each query with each context",
    "zip": "queries and contexts in order",
    "random": "contexts drawn for each query",
}
# The lines after the heading of the optional keys are a job's keys without their "# ".
TEMPLATE = """\
# A job of Context Diffusion for {queries} and {contexts}.
# Check it and see two rows:  context-diffusion validate {command_job} --sample 2 --pictures sample.png
# Generate, or resume:        context-diffusion run {command_job}
kind: generate
manifest: {manifest}  # {rows} rows: {paired}
output: {output}  # images/, report.html, data/
model: {model}  # bundled: small, needs no GPU; flux2-klein, sdxl, sd15: for a GPU; a folder or a hub id
{allow}
# Optional keys. Remove "# " at the start of a line to use it.
# control: canny  # what is kept of the query: canny, soft_edges, gray, none; default: the model's
# score: [layout, style]  # measure each image; report.html shows histograms
# max_failed: 5%  # stop early if more rows fail
# output_format: parquet  # where images are stored: files, parquet, both, webdataset
# settings:  # of every row; a column of the manifest with the same name overrides them
#   num_inference_steps: 20  # more steps take longer and may add detail
#   guidance_scale: 1.5  # how strongly the prompt is followed; 1 is fastest
#   context_scale: 0.8  # how strongly the contexts are followed, 0 to 1
#   num_images: 2  # images of each row, with different seeds
#   width: 256  # pixels of the image, with height; default: the model's size, 128 x 128 of the bundled one
#   height: 256
"""


def write_job(pairing: Pairing, manifest: str, job_file: str, model: str, output: str) -> dict[str, Any]:
    """Write the manifest and the job file. Existing files are never overwritten.

    Returns the manifest's URI and number of rows, and the job file's URI. Raises JobError, ManifestError,
    ModelError.
    """
    storage = Storage()
    job_uri = normal(job_file)
    if not job_uri.lower().endswith((".yaml", ".yml")):
        raise JobError(f"--job {job_file}: expected a name that ends in .yaml or .yml")
    for option, file in (("--job", job_file), ("--rows", manifest)):
        if storage.exists(normal(file)):
            raise JobError(f"{option} {file} exists already: remove it or choose another name")
    if storage.exists(Output(normal(output), storage).plan):
        raise JobError(f"--output {output} holds the images of another job: choose another name")
    check_job({"kind": "generate", "manifest": manifest, "output": output, "model": model}, job_file)
    check_name(model)
    written = write_manifest(pairing, manifest)
    # A job with `allow` reads nothing else, so the manifest's own folder is named too.
    allow = [parent(written["manifest"]), *written["allow"]] if written["allow"] else []
    text = job_text(pairing, manifest, written["rows"], job_file, model, output, allow)
    if not storage.create(job_uri, text.encode()):
        raise JobError(f"--job {job_file} exists already: remove it or choose another name")
    return {"job": job_uri, "manifest": written["manifest"], "rows": written["rows"], "allow": allow}


def job_text(
    pairing: Pairing, manifest: str, rows: int, job_file: str, model: str, output: str, allow: list[str]
) -> str:
    """Return the text of the job file. Raises JobError if it would not be a valid job."""
    allow_line = f"allow: [{', '.join(map(_scalar, allow))}]  # where rows may read images\n" if allow else ""
    text = TEMPLATE.format(
        queries=_comment(pairing.queries),
        contexts=_comment(pairing.contexts),
        command_job=_comment(shlex.quote(job_file)),
        manifest=_scalar(manifest),
        rows=rows,
        paired=PAIRED[pairing.pair],
        output=_scalar(output),
        model=_scalar(model),
        allow=allow_line,
    )
    check_job(parse(text), job_file)
    return text


def _scalar(text: str) -> str:
    """Return a text as a YAML value, in quotes where it would be read as something else."""
    try:
        is_plain = yaml.safe_load(f"[{text}]") == [text]
    except yaml.YAMLError:
        is_plain = False
    return text if is_plain and "\n" not in text else json.dumps(text)


def _comment(text: str) -> str:
    """Return a text that stays within its line of comment."""
    return text if text.isprintable() else json.dumps(text)
